"""`rekatrain chat EXPORT`: talk to an export in the terminal, over several rounds, with the reasoning dimmed.

The model is loaded with transformers, or a server that speaks OpenAI's protocol answers (`--url`). A turn ends at
`<sep>`. Ctrl-C ends the answer that is being written, Ctrl-D the conversation.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.text import Text

from rekatrain.data.chat import (
    REASONING_CLOSE,
    REASONING_OPEN,
    STOP,
    Message,
    encode_prompt,
    parse_completion,
    render_prompt,
)
from rekatrain.data.errors import InputError

MAX_NEW_TOKENS = 4096
TAGS = (REASONING_OPEN, REASONING_CLOSE, STOP)
# A model's text, in chunks of any size, after the conversation so far.
Answer = Callable[[list[Message]], Iterator[str]]


def chat(export: Path | None, *, url: str | None = None, console: Console | None = None) -> None:
    """Read questions from the terminal and print the answers, until the input ends.

    export: a folder of `rekatrain export`, merged or an adapter
    url:    of a server that speaks OpenAI's protocol, such as http://127.0.0.1:8000/v1, instead of an export
    """
    console = console or Console(highlight=False)
    if (export is None) == (url is None):
        raise InputError("chat needs one of two: the folder of an export, or --url of a server")
    answer = answers_of_server(url) if url is not None else answers_of_export(Path(export or ""))
    messages: list[Message] = []
    while True:
        try:
            question = console.input("[bold]> [/bold]").strip()
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D ends the conversation)", style="dim")
            continue
        except EOFError:
            console.print()
            return
        if not question:
            continue
        if any(tag in question for tag in TAGS):
            console.print(f"a question cannot contain {', '.join(TAGS)}: the format has no escape", style="red")
            continue
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": show(answer(messages), console)})


def show(chunks: Iterator[str], console: Console) -> str:
    """Print a streamed turn, its reasoning dimmed, up to `<sep>` or Ctrl-C; return the answer without the reasoning."""
    text, shown = "", {"reasoning": "", "answer": ""}
    try:
        with closing(chunks):  # type: ignore[type-var]  # generators, which stop their source when they are closed
            for chunk in chunks:
                text += chunk
                _print_new(text[: len(text) - _partial_tag(text)], shown, console)
                if STOP in text:
                    break
            _print_new(text, shown, console)
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    console.print()
    return shown["answer"]


def _print_new(text: str, shown: dict[str, str], console: Console) -> None:
    """Print what a longer text has more than was shown."""
    parsed = parse_completion(text)
    for part, value, style in (("reasoning", parsed.reasoning or "", "dim"), ("answer", parsed.answer, "")):
        new = value[len(shown[part]) :]
        if new:
            gap = "\n\n" if part == "answer" and not shown["answer"] and shown["reasoning"] else ""
            console.print(Text(gap + new, style=style), end="", soft_wrap=True)
            shown[part] = value


def _partial_tag(text: str) -> int:
    """Return the number of characters at the end that may become a tag."""
    return max((n for tag in TAGS for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)


def answers_of_export(folder: Path) -> Answer:
    """Load an export with transformers; InputError for a folder that is none."""
    if not (folder / "tokenizer_config.json").exists():
        raise InputError(f"{str(folder)!r} is no export: name the OUT of rekatrain export RUN OUT")
    if list(folder.glob("*.gguf")):
        raise InputError(
            f"{str(folder)!r} holds GGUF files: start bash {folder}/serving/llama_server.sh FILE, then "
            "rekatrain chat --url http://127.0.0.1:8080/v1"
        )
    import torch
    from transformers import StoppingCriteria, TextIteratorStreamer

    from rekatrain.data.tokenizer import load_tokenizer
    from rekatrain.trainer.models.load import load_model

    tokenizer = load_tokenizer(str(folder))
    dtype = json.loads((folder / "config.json").read_text()).get("dtype") if (folder / "config.json").exists() else None
    model = load_model(str(folder), dtype="bfloat16" if dtype == "bfloat16" else "float32").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    config = model.generation_config
    config.eos_token_id, config.stop_strings = tokenizer.eos_token_id, [STOP]

    class Stopped(StoppingCriteria):
        """Ends the generation when the reader has gone."""

        def __init__(self) -> None:
            self.event = threading.Event()

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # upstream's
            return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)

    def answer(messages: list[Message]) -> Iterator[str]:
        ids = torch.tensor([encode_prompt(render_prompt(messages), tokenizer)], device=model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, errors = Stopped(), []
        length, context = ids.shape[1], model.config.max_position_embeddings
        if length >= context:
            raise InputError(f"the conversation has {length} tokens and the model's context {context}: start a new one")
        config.max_new_tokens = min(MAX_NEW_TOKENS, context - length)
        options = {"tokenizer": tokenizer, "streamer": streamer, "generation_config": config}
        options |= {"stopping_criteria": [stopped]}

        def generate() -> None:
            try:
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            except Exception as error:  # it would end this thread alone, and the reader would wait forever
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, name="answer", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.event.set()
            thread.join()
        if errors:
            raise errors[0]

    return answer


def answers_of_server(url: str) -> Answer:
    """Return the answers of a server that speaks OpenAI's protocol; InputError if it does not answer."""
    client = httpx2.Client(base_url=url.rstrip("/") + "/", timeout=httpx2.Timeout(600, connect=10))
    models = _checked(client, client.build_request("GET", "models")).json().get("data") or []
    if not models:
        raise InputError(f"--url {url}: the server has no model")
    name = models[0]["id"]

    def answer(messages: list[Message]) -> Iterator[str]:
        body = {"model": name, "messages": messages, "stream": True, "stop": [STOP], "max_tokens": MAX_NEW_TOKENS}
        response = _checked(client, client.build_request("POST", "chat/completions", json=body))
        part = "start"
        with closing(response):
            for line in response.iter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                choices = json.loads(line.removeprefix("data:")).get("choices") or [{}]
                delta = choices[0].get("delta") or {}
                # vLLM splits the reasoning off; llama.cpp leaves it in the content.
                thought = delta.get("reasoning") or delta.get("reasoning_content")
                if thought:
                    yield thought if part == "reasoning" else f" {REASONING_OPEN}\n{thought}"
                    part = "reasoning"
                if delta.get("content"):
                    yield f"\n{REASONING_CLOSE}\n\n{delta['content']}" if part == "reasoning" else delta["content"]
                    part = "answer"

    return answer


def _checked(client: httpx2.Client, request: httpx2.Request) -> httpx2.Response:
    """Send a request; raise InputError, in one line, unless it succeeds."""
    try:
        response = client.send(request, stream=request.method == "POST")
    except httpx2.TransportError as error:
        raise InputError(f"--url {client.base_url}: no answer ({error or type(error).__name__})") from error
    if response.is_error:
        text = " ".join(response.read().decode(errors="replace").split())[:300]
        raise InputError(f"--url {client.base_url}: status {response.status_code}: {text}")
    return response
