"""Answers for `rekatrain chat`: of an export that transformers loads, or of a server that speaks OpenAI's protocol."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2

from rekatrain.data.chat import REASONING_CLOSE, REASONING_OPEN, STOP, Message, encode_prompt, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.trainer.run.folder import RECIPE_FILE

# A model's text, in chunks of any size, after the conversation so far.
Answer = Callable[[list[Message]], Iterator[str]]


def check_export(folder: Path) -> None:
    """Raise InputError, with the command to use instead, unless `folder` is an export that transformers can load."""
    name = str(folder)
    if name.startswith(("http:/", "https:/")):
        url = name.replace(":/", "://", 1)
        raise InputError(f"{url} is no folder of an export: write rekatrain chat --url {url}")
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        files = sorted(folder.glob("*.gguf")) or [folder]
        raise InputError(
            f"{name!r} is a GGUF export: start bash {files[0].parent}/serving/llama_server.sh {files[0].name}, then "
            "rekatrain chat --url http://127.0.0.1:8080/v1"
        )
    if (folder / RECIPE_FILE).exists():
        raise InputError(f"{name!r} is a run: write rekatrain export {name} OUT, then rekatrain chat OUT")
    if not (folder / "tokenizer_config.json").exists():
        raise InputError(f"{name!r} is no export: name the OUT of rekatrain export RUN OUT")
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    if any("SequenceClassification" in architecture for architecture in config.get("architectures") or []):
        raise InputError(f"{name!r} is a reward model: it scores answers and writes none")
    if "quantization_config" in config:
        raise InputError(
            f"{name!r} is quantized for vLLM: start bash {name}/serving/vllm.sh, then "
            "rekatrain chat --url http://127.0.0.1:8000/v1"
        )


def answers_of_export(folder: Path) -> Answer:
    """Load an export with transformers, in the dtype of its weights; InputError for a folder that is none."""
    check_export(folder)
    import torch
    from transformers import AutoConfig, StoppingCriteria, TextIteratorStreamer

    from rekatrain.data.tokenizer import load_tokenizer
    from rekatrain.trainer.models.load import load_model
    from rekatrain.trainer.models.source import find_source
    from rekatrain.trainer.models.weights import readable

    tokenizer = load_tokenizer(str(folder))
    source = find_source(str(folder))
    with readable(source.base):
        dtype = AutoConfig.from_pretrained(source.base, revision=source.revision).dtype
    model = load_model(str(folder), dtype="bfloat16" if dtype == torch.bfloat16 else "float32").eval()
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
            raise InputError(f"the conversation has {length} tokens and the model's context {context}")
        config.max_new_tokens = context - length
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


def answers_of_server(url: str, model: str | None = None) -> tuple[str, Answer]:
    """Return the name of a server's model, and its answers by OpenAI's protocol; InputError if it does not answer.

    model: a name that the server knows; without it the first adapter that vLLM lists, or else the first model
    """
    try:
        client = httpx2.Client(base_url=url.rstrip("/") + "/", timeout=httpx2.Timeout(600, connect=10))
    except httpx2.InvalidURL as error:
        raise InputError(f"--url {url}: {error}") from error
    name = model or _find_model(client, url)

    def answer(messages: list[Message]) -> Iterator[str]:
        # Without max_tokens: an answer may fill the context, and a server rejects a number beyond it.
        body = {"model": name, "messages": messages, "stream": True, "stop": [STOP]}
        response = _checked(client, client.build_request("POST", "chat/completions", json=body))
        part = "start"
        with closing(response):
            for event in _events(response, url):
                delta = (event.get("choices") or [{}])[0].get("delta") or {}
                # vLLM splits the reasoning off; llama.cpp leaves it in the content.
                thought = delta.get("reasoning") or delta.get("reasoning_content")
                if thought:
                    yield thought if part == "reasoning" else f" {REASONING_OPEN}\n{thought}"
                    part = "reasoning"
                if delta.get("content"):
                    yield f"\n{REASONING_CLOSE}\n\n{delta['content']}" if part == "reasoning" else delta["content"]
                    part = "answer"

    return name, answer


def _find_model(client: httpx2.Client, url: str) -> str:
    """Return the name of the first adapter in the server's list, which vLLM puts after its base, or the first name."""
    response = _checked(client, client.build_request("GET", "models"))
    try:
        listed = response.json()
    except ValueError:
        listed = None
    models = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(models, list):
        raise InputError(
            f"--url {url}: {response.url} holds no list of models; the URL of OpenAI's protocol mostly ends in /v1"
        )
    if not models:
        raise InputError(f"--url {url}: the server lists no model: name it with --model")
    adapters = [model for model in models if model.get("parent")]
    return str((adapters or models)[0]["id"])


def _events(response: httpx2.Response, url: str) -> Iterator[dict[str, Any]]:  # JSON
    """Return the events of a streamed answer; InputError for an error in it, or a connection that breaks."""
    try:
        for line in response.iter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line.removeprefix("data:"))
            if error := event.get("error"):
                text = str(error.get("message", error) if isinstance(error, dict) else error)
                raise InputError(f"--url {url}: {' '.join(text.split())[:300]}")
            yield event
    except (httpx2.TransportError, json.JSONDecodeError) as fault:
        raise InputError(f"--url {url}: the answer broke off ({fault or type(fault).__name__})") from fault


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
