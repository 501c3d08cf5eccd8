"""Talk to the server of this export for two turns: `pip install openai`, then `python serving/client.py [URL]`."""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
messages = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is 17 + 25?"},
]
# vLLM with the plugin and llama.cpp with -r stop at <sep> on their own. Other servers need `stop` in the request.
settings = {"model": "$name", "max_tokens": 512, "stop": ["<sep>"]}

answer = client.chat.completions.create(messages=messages, **settings).choices[0].message
print("reasoning:", getattr(answer, "reasoning", None))  # from vLLM; llama.cpp leaves the reasoning in the content
print("answer:", answer.content)

# Send back only the answer: the chat template would drop the reasoning of earlier turns anyway.
messages += [{"role": "assistant", "content": answer.content or ""}, {"role": "user", "content": "And twice that?"}]
for chunk in client.chat.completions.create(messages=messages, stream=True, **settings):
    delta = chunk.choices[0].delta
    print(getattr(delta, "reasoning", None) or delta.content or "", end="", flush=True)
print()
