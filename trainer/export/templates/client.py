"""Two rounds with the server of this export: `pip install openai`, then `python serving/client.py [URL]`."""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
messages = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is 17 + 25?"},
]
# vLLM's plugin and llama.cpp's -r stop at <sep> by themselves; a client that says so is right with every server.
settings = {"model": "$name", "max_tokens": 512, "stop": ["<sep>"]}

answer = client.chat.completions.create(messages=messages, **settings).choices[0].message
print("reasoning:", getattr(answer, "reasoning", None))  # vLLM's name for it; llama.cpp leaves it in the content
print("answer:", answer.content)

# Only the answer is kept: the chat template would drop an earlier turn's reasoning anyway.
messages += [{"role": "assistant", "content": answer.content or ""}, {"role": "user", "content": "And twice that?"}]
for chunk in client.chat.completions.create(messages=messages, stream=True, **settings):
    delta = chunk.choices[0].delta
    print(getattr(delta, "reasoning", None) or delta.content or "", end="", flush=True)
print()
