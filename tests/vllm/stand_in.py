"""A stand-in for a vLLM 0.30 server in fast tests: the same routes and schema, completions by the in-process sampler.

It draws with the uniform numbers of an in-process run, so a run with it must equal that run.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rekatrain.data.stop import StopSearch
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.in_process import Completion, Sampler
from rekatrain.trainer.rloo.sampler.vllm.group_requests import seed_of

# transformers' loader patches its classes while it runs: of two loads at once, in two servers' threads, the second
# would put the patch back as the original, and no model of this process would tie its embeddings from then on.
LOADING = threading.Lock()


class LateSampler(Sampler):
    """The sampler in process, for the rest of completions of which `num_done` tokens are drawn.

    indices: of these completions in their group
    """

    def __init__(self, *args: Any, num_done: int, indices: Sequence[int], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._num_done, self._indices = num_done, indices

    def _generator(self, key: list[int]) -> np.random.Generator:
        generator = np.random.default_rng([*key[:-1], self._indices[key[-1]]])
        generator.random(self._num_done)
        return generator


class StandIn:
    """Responds as a vLLM server that was started with the model in `folder`.

    trouble: called with the number (from 0) and the body of each request for completions; a result that is not None is
             the response
    pace:    seconds per token of a streamed response
    events:  begins and ends of streamed groups, with their steps, and loads of weights, with the number of updates
    loaded:  names of the weights that were loaded, in order
    keys:    by seed, the keys of prompts and of the first and second continuation of each completion
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int, has_lora: bool = True) -> None:
        self.folder, self.tokenizer, self.has_lora = folder, tokenizer, has_lora
        self.version, self.context = "0.30.0", 256
        self.trouble: Callable[[int, dict], tuple[int, Any] | None] = lambda number, body: None
        self.num_requests = 0
        self.loaded: list[str] = []
        self.finished: list[tuple[str, int]] = []
        self.max_logprobs = 20
        keys = [(1, seed, step, prompt_index) for step in range(20) for prompt_index in range(20)]
        self.keys = {
            seed_of(key): key
            for key in [*keys, *((*key, index, n) for key in keys for index in range(4) for n in (1, 2))]
        }
        self.pace, self.paths, self.events = 0.0, dict[str, str](), list[tuple[str, int]]()
        self._prompts: dict[tuple[int, ...], list[list[int]]] = {}
        self._lock = threading.Lock()
        self.restart()

    def restart(self) -> None:
        """Forget all weights but the first."""
        self.adapters: dict[str, PeftModel] = {}
        self.is_paused = False
        self.model: Any = self._load(self.folder)
        self.weight_version = "default"

    @staticmethod
    def _load(folder: str | Path, adapter: str | None = None) -> Any:
        with LOADING:
            model = LlamaForCausalLM.from_pretrained(folder)
            return model if adapter is None else PeftModel.from_pretrained(model, adapter)

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        with self._lock:
            name = path.removeprefix("/v1").strip("/").split("?")[0].replace("/", "_")
            return getattr(self, f"_{name}", lambda body: (404, {"detail": "Not Found"}))(body)

    def _health(self, _: None) -> tuple[int, Any]:
        return 200, {}

    def _version(self, _: None) -> tuple[int, Any]:
        return 200, {"version": self.version}

    def _models(self, _: None) -> tuple[int, Any]:
        served = [{"id": "policy", "root": str(self.folder), "max_model_len": self.context}]
        return 200, {"data": [*served, *({"id": name, "root": name} for name in self.adapters)]}

    def _tokenize(self, body: Any) -> tuple[int, Any]:
        return 200, {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}

    def _load_lora_adapter(self, body: Any) -> tuple[int, Any]:
        if not body["lora_name"]:
            return 400, {"error": {"message": "Both 'lora_name' and 'lora_path' must be provided."}}
        if not self.has_lora:
            return 500, {"error": {"message": "Call to add_lora method failed: LoRA is not enabled."}}
        if not Path(body["lora_path"]).exists():
            return 404, {"error": {"message": f"No adapter found for {body['lora_path']}"}}
        if body["lora_name"] in self.adapters:
            return 400, {"error": {"message": "already loaded"}}
        self.paths[body["lora_name"]] = body["lora_path"]
        self.adapters[body["lora_name"]] = self._load(self.folder, body["lora_path"])
        self.loaded.append(body["lora_name"])
        return 200, b"Success"

    def _unload_lora_adapter(self, body: Any) -> tuple[int, Any]:
        del self.adapters[body["lora_name"]]
        return 200, b"Success"

    def _weight_info(self, _: None) -> tuple[int, Any]:
        return 200, {"weight_version": self.weight_version}

    def _collective_rpc(self, body: Any) -> tuple[int, Any]:
        if body["method"] == "list_loras":
            if not self.has_lora:
                return 500, {"error": {"message": "LoRA is not enabled."}}
            return 200, {"results": [list(range(1, len(self.adapters) + 1))]}
        if body["method"] == "remove_lora":  # vLLM reads an adapter that it lacks with the next token
            name = list(self.adapters)[body["args"][0] - 1]
            self.adapters[name] = self._load(self.folder, self.paths[name])
            return 200, {"results": ["True"]}
        assert body["method"] == "reload_weights"
        self.model = self._load(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def _reset_prefix_cache(self, _: None) -> tuple[int, Any]:
        return 200, {"success": True}

    def _update_weight_version(self, body: Any) -> tuple[int, Any]:
        self.weight_version = body["new_version"]
        self.events.append(("loads", int(self.weight_version.split("-")[-2])))
        self.loaded.append(self.weight_version)
        return 200, {"success": True}

    def _pause(self, _: None) -> tuple[int, Any]:
        self.is_paused = True
        return 200, {"status": "paused"}

    def _resume(self, _: None) -> tuple[int, Any]:
        self.is_paused = False
        return 200, {"status": "resumed"}

    def _is_paused(self, _: None) -> tuple[int, Any]:
        return 200, {"is_paused": self.is_paused}

    def _completions(self, body: Any) -> tuple[int, Any]:
        if "prompt_logprobs" in body:
            return 200, {"choices": [{"prompt_logprobs": self._prompt_logprobs(body)}]}
        if body["logprobs"] > self.max_logprobs:
            message = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed"
            return 400, {"error": {"message": message}}
        if (forced := body.get("logit_bias")) and list(forced.values()) == [100.0]:
            choice = {"token_ids": [int(*forced)], "logprobs": {"token_logprobs": [self.forced_logprob]}}
            return 200, {"choices": [choice]}
        if body["max_tokens"] == 1 and "stop" not in body:
            return 200, {"choices": [{"logprobs": {"top_logprobs": [self._likeliest(body)]}}]}
        self.num_requests += 1
        if (trouble := self.trouble(self.num_requests - 1, body)) is not None:
            return trouble
        name = body.get("model", "policy")
        if name != "policy" and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        assert body["stop"] == ["<sep>"] and body["include_stop_str_in_output"] and body["return_token_ids"]
        assert sorted(map(int, body["logit_bias"])) == list(range(len(self.tokenizer), len(self.tokenizer) + 20))
        if body.get("stream"):
            return 200, self._stream(name, body)
        model = self.adapters.get(name, self.model)
        group = self._sample(model, body)
        choices = [
            {"index": index, "token_ids": c.ids, "logprobs": self._logprobs(model, body, c), "finish_reason": "stop"}
            for index, c in enumerate(group)
        ]
        self.finished.append((name, body["seed"]))
        return 200, {"model": name, "choices": choices[::-1]}  # out of order: the index counts

    def _stream(self, name: str, body: Any) -> Iterator[bytes]:
        """Draw token by token, with the weights of that moment; a pause freezes the request."""
        key, ids = self.keys[body["seed"]], [list[int]() for _ in range(body["n"])]
        self.events.append(("begins", key[2]))
        assert len(key) == 4 and body["cache_salt"]
        uniforms = [np.random.default_rng([*key, index]).random(body["max_tokens"]) for index in range(body["n"])]
        stop, live = StopSearch(self.tokenizer), list(range(body["n"]))
        while live:
            time.sleep(self.pace)
            with self._lock, torch.no_grad():
                if self.is_paused:
                    continue
                rows = torch.tensor([body["prompt"] + ids[index] for index in live])
                logits = self.adapters.get(name, self.model)(rows).logits[:, -1, : len(self.tokenizer)]
                position = len(ids[live[0]])
                at_position = torch.tensor([uniforms[index][position] for index in live])
                drawn, logprobs, _ = draw(logits, at_position, body["temperature"])
            choices = []
            for index, token, logprob in zip(live, drawn.tolist(), logprobs.tolist(), strict=True):
                ids[index].append(token)
                is_last = len(ids[index]) == body["max_tokens"] or token == self.tokenizer.eos_token_id
                is_last = is_last or stop.completes_at(ids[index], len(ids[index]))
                choice = {"index": index, "token_ids": [token], "logprobs": {"token_logprobs": [logprob]}}
                choices.append({**choice, "finish_reason": "stop" if is_last else None})
            yield f"data: {json.dumps({'model': name, 'choices': choices})}\n\n".encode()
            live = [choice["index"] for choice in choices if choice["finish_reason"] is None]
        self.finished.append((name, body["seed"]))
        self.events.append(("ends", key[2]))
        yield b"data: [DONE]\n\n"

    def _prompt_logprobs(self, body: Any) -> list[dict[str, Any] | None]:
        model, ids = self.adapters.get(body.get("model", "policy"), self.model), torch.tensor([body["prompt"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(dim=1)
        after_first = zip(logprobs, body["prompt"][1:], strict=False)
        return [None, *({str(token): {"logprob": row[token].item()}} for row, token in after_first)]

    def _likeliest(self, body: Any) -> dict[str, float]:
        model, ids = self.adapters.get(body.get("model", "policy"), self.model), torch.tensor([body["prompt"]])
        with torch.no_grad():
            top = model(ids).logits[0, -1].log_softmax(dim=0).topk(body["logprobs"])
        return {f"token_id:{token}": value for value, token in zip(*(each.tolist() for each in top), strict=True)}

    forced_logprob = 0.0

    def _sample(self, model: Any, body: Any) -> list[Completion]:
        """Sample a group, or the rest of one completion with the uniform numbers that come after its first part."""
        key = self.keys[body["seed"]]
        # A held-out prompt has the key of a prompt of the first step.
        known = self._prompts.setdefault(key[:4], [])
        prompt = next((each for each in known if body["prompt"][: len(each)] == each), body["prompt"])
        known += [] if prompt in known else [prompt]
        num_done, indices = len(body["prompt"]) - len(prompt), range(body["n"]) if len(key) == 4 else [key[4]]
        assert (
            body["prompt"][: len(prompt)] == prompt and (num_done > 0) == (len(key) == 6) and len(indices) == body["n"]
        )
        sampler = LateSampler(
            model,
            self.tokenizer,
            num_done=num_done,
            indices=indices,
            max_completion_length=body["max_tokens"],
            temperature=body["temperature"],
            batch_size=body["n"],
            top_p=body["top_p"],
            top_k=body["top_k"] or None,
        )
        return sampler.sample([body["prompt"]], [key[:4]], body["n"])[0]

    def _logprobs(self, model: Any, body: Any, completion: Completion) -> dict[str, Any]:
        """List log-probs of the drawn token and, of the kept tokens, as many of the most likely as the request says."""
        assert body["return_tokens_as_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([body["prompt"] + completion.ids])).logits[0, len(body["prompt"]) - 1 : -1]
        logits[:, len(self.tokenizer) :] -= 100
        warpers: list[LogitsProcessor] = [TopKLogitsWarper(body["top_k"])] if body["top_k"] else []
        for warper in [TemperatureLogitsWarper(body["temperature"]), *warpers, TopPLogitsWarper(body["top_p"])]:
            logits = warper(torch.empty(0), logits)
        listed = []
        for logprobs, drawn in zip(logits.log_softmax(dim=1), completion.ids, strict=True):
            likeliest = [drawn, *logprobs.topk(body["logprobs"]).indices.tolist()]
            listed.append({f"token_id:{token}": max(logprobs[token].item(), -9999.0) for token in likeliest})
        return {"token_logprobs": completion.logprobs, "top_logprobs": listed}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch add in one order, whichever process samples."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
