"""Peak memory of the stages' own passes over a micro-batch, by running them on tensors without data.

`Passes` answers for a recipe; sizes of what is run are the largest that the recipe allows. The attention of a GPU is
FlexAttention's or flash attention's, which keep queries, keys, values, outputs and a number a query and head, as
torch's fused attention does for one causal text: that is what is run in their place.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from rekatrain.trainer.models import Policy
from rekatrain.trainer.plan.live_memory import LiveMemory, Parts, over_layers, pretended
from rekatrain.trainer.plan.model_size import build
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.kernels.cpu.cost import PassCost
from rekatrain.trainer.rloo.kernels.grouped_attention import run_decoder
from rekatrain.trainer.rloo.logprobs import (
    LOGIT_BYTES_AT_ONCE,
    CompletionLogprobs,
    PackedCompletions,
    decoder_and_head,
    pack_completions,
)
from rekatrain.trainer.rloo.microbatch import GroupPart, pack
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.kv_cache import FIRST_ROOM, ForkedCache

ACTIVATIONS, LM_HEAD, GRADIENTS, KV_CACHE = "activations", "LM head", "gradients", "KV cache"


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """What a recipe's passes take besides the states that are there all the time.

    prompts:         prompts of a step that one process has (stage rloo)
    prompt_tokens:   length of each
    row_tokens:      tokens of a row that one process holds (stages sft and reward)
    casts:           whether products are computed in bfloat16 over other weights (autocast)
    reduces_at_once: whether a gradient leaves for its shard as soon as it is computed (ZeRO 1 to 3)
    is_cpu:          attention and pieces of logits are those of a CPU
    """

    recipe: Recipe
    config: PretrainedConfig
    num_layers: int
    prompts: int = 1
    prompt_tokens: int = 256
    row_tokens: int = 1024
    casts: bool = False
    reduces_at_once: bool = False
    is_cpu: bool = False

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients of earlier micro-batches are there when one begins."""
        return self.num_micro_batches > 1 and not self.reduces_at_once

    @cached_property
    def _key(self) -> str:
        recipe = {name: getattr(self.recipe, name) for name in ("stage", "model", "lora", "rloo", "sft", "reward")}
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "config")}
        return json.dumps([recipe, self.config.to_dict(), others], default=str, sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Passes) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def train(self, *, checkpointing: bool) -> Parts:
        """Forward, loss and backward of the largest micro-batch."""
        return over_layers(lambda num_layers: self._train(num_layers, checkpointing), self.num_layers)

    def score(self) -> Parts:
        """The same micro-batch without a gradient, as a reference is run (stage rloo)."""
        return over_layers(self._score, self.num_layers)

    def sample(self) -> Parts:
        """Prefill, cache and draws of the in-process sampler's largest batch (stage rloo)."""
        return over_layers(self._prefill, self.num_layers) | self._draw() + self.cache()

    @property
    def _rloo(self) -> RLOOConfig:
        return RLOOConfig(**self.recipe.rloo)

    @cached_property
    def _batches(self) -> list[list[GroupPart]]:
        config = self._rloo
        with torch.device("meta"):
            decoder, _ = decoder_and_head(build(self.config, self.recipe, 1))  # of any depth: only ratios count
        cost = PassCost.of(decoder)
        cost = cost if self.is_cpu else replace(cost, join=0.0)  # a GPU has the two parts in one kernel
        completions = [config.max_completion_length - 1] * config.num_generations
        return pack([(self.prompt_tokens, completions)] * self.prompts, config.micro_batch_tokens, cost)

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes of a process in one update."""
        if self.recipe.stage == "rloo":
            return len(self._batches)
        section = self.recipe.sft if self.recipe.stage == "sft" else self.recipe.reward
        return int(section.get("gradient_accumulation_steps", 1))

    @cached_property
    def micro_batch(self) -> tuple[list[int], list[list[int]], list[bool]]:
        """Of the largest micro-batch: prompts' lengths, their completions', and whether each prompt is run once."""
        config = self._rloo
        largest = max(self._batches, key=lambda batch: sum(self._tokens(len(p.members), p.is_shared) for p in batch))
        return (
            [self.prompt_tokens] * len(largest),
            [[config.max_completion_length] * len(piece.members) for piece in largest],
            [piece.is_shared for piece in largest],
        )

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that the largest micro-batch runs the model on."""
        if self.recipe.stage != "rloo":
            return self._rows * self.row_tokens
        _, groups, shared = self.micro_batch
        return sum(self._tokens(len(group), is_shared) for group, is_shared in zip(groups, shared, strict=True))

    def _tokens(self, num_completions: int, is_shared: bool) -> int:
        own = self._rloo.max_completion_length - 1
        return num_completions * own + self.prompt_tokens * (1 if is_shared else num_completions)

    @property
    def _rows(self) -> int:
        section = self.recipe.sft if self.recipe.stage == "sft" else self.recipe.reward
        rows = int(section.get("per_device_train_batch_size", 8))
        return 2 * rows if self.recipe.stage == "reward" else rows

    def _part(self, tensor: Tensor) -> str:
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self.config.get_text_config().vocab_size
        return LM_HEAD if is_logits else ACTIVATIONS

    def _model(self, num_layers: int, checkpointing: bool = False) -> Policy:
        attention: dict[str, Any] = {}
        if (name := self.recipe.model.get("attn_implementation")) is not None:
            # The kernels of flash attention are not for a CPU; what they keep is the same.
            attention = {"attn_implementation": "sdpa" if "flash" in name else name}
        with torch.device("meta"):
            model = build(self.config, self.recipe, num_layers, **attention)
        model.train()
        if checkpointing:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            if self.recipe.stage == "rloo":
                model.activation_checkpointing_enable()
            else:
                cast(PreTrainedModel, model).gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
                if self.recipe.lora is not None:
                    cast(PreTrainedModel, base).enable_input_require_grads()
        return model

    def _autocast(self) -> Any:  # one of two context managers
        return torch.autocast("cpu", torch.bfloat16) if self.casts else nullcontext()

    @contextmanager
    def _pieces(self) -> Iterator[None]:
        """Logits worked on in the pieces of the device that is planned for: what is run here is run on a CPU."""
        before = LOGIT_BYTES_AT_ONCE["cpu"]
        LOGIT_BYTES_AT_ONCE["cpu"] = LOGIT_BYTES_AT_ONCE["cpu" if self.is_cpu else "cuda"]
        try:
            yield
        finally:
            LOGIT_BYTES_AT_ONCE["cpu"] = before

    def _train(self, num_layers: int, checkpointing: bool) -> Parts:
        model = self._model(num_layers, checkpointing)
        _ = self.num_micro_batches  # found out by a model of its own, which is not to be counted
        with pretended(model):
            if self.keeps_gradients:
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            live = LiveMemory(model, self._part)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._gradient_hook(live))
            with live, self._pieces():
                with self._autocast():
                    loss = self._loss(model)
                loss.backward()
        return live.peak

    def _gradient_hook(self, live: LiveMemory) -> Any:
        def hook(parameter: Tensor) -> None:
            if self.reduces_at_once:
                parameter.grad = None
            elif not self.keeps_gradients and parameter.grad is not None:
                live.move(parameter.grad, GRADIENTS)

        return hook

    def _loss(self, model: Policy) -> Tensor:
        if self.recipe.stage == "rloo":
            policy = CompletionLogprobs(model, temperature=1.0, num_tokens=self.config.vocab_size).train()
            return cast(Tensor, policy(self._packed())).sum()
        ids = torch.zeros(self._rows, self.row_tokens, dtype=torch.long)
        if self.recipe.stage == "reward":
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().mean()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        add_fused_lm_head(cast(PreTrainedModel, base), outputs=("log_probs", "entropy", "is_top1"))
        return -model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs.sum()

    def _packed(self) -> PackedCompletions:
        prompts, groups, shared = self.micro_batch
        rows = pack_completions(
            [[0] * length for length in prompts],
            [[[0] * length for length in group] for group in groups],
            torch.device("cpu"),
            is_shared=shared,
        )
        return rows if self.is_cpu else replace(rows, layout=_OneText(rows.layout.position_ids))  # type: ignore[arg-type]

    def _score(self, num_layers: int) -> Parts:
        model = self._model(num_layers)
        _ = self.micro_batch  # found out by a model of its own, which is not to be counted
        with pretended(model):
            policy = CompletionLogprobs(model, temperature=1.0, num_tokens=self.config.vocab_size)
            live = LiveMemory(model, self._part)
            with live, self._pieces(), torch.no_grad(), self._autocast():
                policy(self._packed())
        return live.peak

    @property
    def sampled_at_once(self) -> int:
        """Completions in the largest batch of the sampler."""
        config = self._rloo
        prompts = min(self.prompts, max(1, config.per_device_generation_batch_size // config.num_generations))
        return prompts * config.num_generations

    def _prefill(self, num_layers: int) -> Parts:
        config = self._rloo
        prompts = self.sampled_at_once // config.num_generations
        model = self._model(num_layers).eval()
        with pretended(model):
            decoder, head = decoder_and_head(model)
            live = LiveMemory(model, self._part)
            with live, torch.no_grad():
                cache = ForkedCache(
                    [self.prompt_tokens] * prompts,
                    config.num_generations,
                    config.max_completion_length,
                    torch.device("cpu"),
                )
                ids = torch.zeros(1, prompts * self.prompt_tokens, dtype=torch.long)
                layout = cache if self.is_cpu else _OneText(cache.prompts.position_ids)
                hidden = run_decoder(decoder, ids, cache.prompts.position_ids, layout)
                head(hidden[0, :prompts])
        return live.peak

    def _draw(self) -> Parts:
        config = self._rloo
        with pretended(nn.Module()):
            logits = torch.empty(self.sampled_at_once, self.config.vocab_size)
            live = LiveMemory(nn.Module(), lambda tensor: LM_HEAD)
            with live:
                draw(logits, torch.empty(len(logits)), config.temperature, config.top_p, config.top_k)
        return live.peak + Counter({LM_HEAD: logits.untyped_storage().nbytes()})

    def cache(self) -> Parts:
        """The sampler's cache when the longest completion ends."""
        config, text = self._rloo, self.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        size = 2 if self.casts or self.recipe.model.get("dtype", "bfloat16") == "bfloat16" else 4
        token = 2 * size * head_dim * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        room = min(FIRST_ROOM, config.max_completion_length)
        while room < config.max_completion_length - 1:
            room = min(2 * room, config.max_completion_length)
        rows, prompts = self.sampled_at_once, self.sampled_at_once // config.num_generations
        of_layer = token * (prompts * self.prompt_tokens + rows * room)
        growing = token * rows * room  # a layer's is copied into larger room
        return Counter({KV_CACHE: self.num_layers * of_layer + growing})


class _OneText:
    """Attention as if all tokens were one causal text: what a fused kernel keeps does not depend on its mask."""

    def __init__(self, position_ids: Tensor) -> None:
        self.position_ids = position_ids

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2)
