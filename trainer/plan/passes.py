"""Measure the peak memory of a stage's own passes by running them on fake tensors.

The attention kernels of a GPU (FlexAttention, flash attention) do not run on a CPU. torch's fused attention over one
causal sequence runs in their place: it keeps the same tensors for the backward pass, namely queries, keys, values,
outputs and one number per query and head.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, masking_utils
from trl.trainer.utils import add_fused_lm_head

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.plan.fused_head import kernels_of_a_gpu
from rekatrain.trainer.plan.live_memory import LiveMemory, Parts, extrapolate_layers, fake_tensors
from rekatrain.trainer.plan.model_size import build
from rekatrain.trainer.plan.workload import Workload
from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.kernels.grouped_attention import ForkedCache, decoder_and_head, run_decoder
from rekatrain.trainer.rloo.kernels.ulysses import SequenceGroup, SlicedLayout
from rekatrain.trainer.rloo.logprobs import (
    LOGIT_BYTES_AT_ONCE,
    CompletionLogprobs,
    PackedCompletions,
    pack_completions,
)
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sequence_parallel import split_tokens

ACTIVATIONS, LM_HEAD, GRADIENTS, KV_CACHE = "activations", "LM head", "gradients", "KV cache"


@lru_cache(maxsize=256)
def train_peak(workload: Workload, checkpointing: bool) -> Parts:
    """Return the peak of forward, loss and backward of the largest micro-batch, in bytes by part.

    checkpointing: True if the backward pass recomputes activations
    """

    def peak(at: int) -> Parts:
        return extrapolate_layers(lambda n: measure_train(workload, n, checkpointing)[at], workload.num_layers)

    forward, backward = peak(0), peak(1)
    return max(forward, backward, key=Counter.total)


@lru_cache(maxsize=256)
def score_peak(workload: Workload) -> Parts:
    """Return the peak of the reference's forward pass over the largest micro-batch, in bytes by part (stage rloo)."""
    return extrapolate_layers(lambda num_layers: _measure_score(workload, num_layers), workload.num_layers)


@lru_cache(maxsize=256)
def sample_peak(workload: Workload) -> Parts:
    """Return the peak of the in-process sampler's largest batch, in bytes by part (stage rloo).

    It is the larger of the prefill, and the last draw with the KV cache at its longest, part by part.
    """
    prefill = extrapolate_layers(lambda num_layers: _measure_prefill(workload, num_layers), workload.num_layers)
    return prefill | _measure_draw(workload) + Counter({KV_CACHE: workload.kv_cache_bytes})


@lru_cache(maxsize=256)
def measure_train(workload: Workload, num_layers: int, checkpointing: bool) -> tuple[Parts, Parts]:
    """Measure the peaks of the forward and of the backward pass with `num_layers` layers, in bytes by part.

    Each grows by the same number of bytes per layer; the larger of both does not, where a deep model has it elsewhere.
    """
    model = make_model(workload, num_layers, checkpointing)
    keeps_gradients = workload.keeps_gradients  # builds another model: keep it outside the measurement
    with fake_tensors(model):
        if keeps_gradients:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        live = LiveMemory(model, _part_of(workload))

        def after_gradient(parameter: Tensor) -> None:
            if workload.reduces_in_backward:
                parameter.grad = None
            elif not keeps_gradients and parameter.grad is not None:
                live.move(parameter.grad, GRADIENTS)

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(after_gradient)
        with live, _head_kernels(workload):
            with _autocast(workload):
                loss = run_loss(workload, model)
            forward = live.restart()
            loss.backward()
    return forward, live.peak


def run_loss(workload: Workload, model: Policy) -> Tensor:
    """Run the stage's forward pass over the largest micro-batch and return a scalar that all outputs contribute to."""
    if workload.recipe.stage == "rloo":
        return cast(Tensor, _logprobs(workload, model).train()(_packed(workload))).sum()
    ids = torch.zeros(workload.num_sequences, workload.sequence_tokens, dtype=torch.long)
    if workload.recipe.stage == "reward":
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().mean()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    add_fused_lm_head(cast(PreTrainedModel, base), outputs=("log_probs", "entropy", "is_top1"))
    mask = torch.ones_like(ids) if workload.has_mask else None
    with _unmasked() if mask is None else nullcontext():
        outputs = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, fused_lm_head=True)
    return -cast(Tensor, outputs.log_probs).sum()


@contextmanager
def _unmasked() -> Iterator[None]:
    """Context in which transformers takes a sequence for one text; of fake tensors it cannot know, and adds a mask."""
    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


def _measure_score(workload: Workload, num_layers: int) -> Parts:
    model = make_model(workload, num_layers)
    _ = workload.largest_micro_batch  # builds another model: keep it outside the measurement
    with fake_tensors(model):
        logprobs = _logprobs(workload, model)
        live = LiveMemory(model, _part_of(workload))
        with live, torch.no_grad(), _autocast(workload), _head_kernels(workload):
            logprobs(_packed(workload))
    return live.peak


def _measure_prefill(workload: Workload, num_layers: int) -> Parts:
    config = workload.rloo
    num_prompts = workload.sampler_batch_size // config.num_generations
    model = make_model(workload, num_layers).eval()
    with fake_tensors(model):
        decoder, head = decoder_and_head(model)
        live = LiveMemory(model, _part_of(workload))
        with live, torch.no_grad():
            cache = ForkedCache(
                [workload.prompt_tokens] * num_prompts,
                config.num_generations,
                config.max_completion_length,
                torch.device("cpu"),
            )
            ids = torch.zeros(1, num_prompts * workload.prompt_tokens, dtype=torch.long)
            layout = cache if workload.is_cpu else _OneSequence(cache.prompts.position_ids)
            hidden = run_decoder(decoder, ids, cache.prompts.position_ids, layout)
            head(hidden[0, :num_prompts])
    return live.peak


def _measure_draw(workload: Workload) -> Parts:
    config = workload.rloo
    with fake_tensors(nn.Module()):
        logits = torch.empty(workload.sampler_batch_size, workload.config.vocab_size)
        live = LiveMemory(nn.Module(), lambda tensor: LM_HEAD)
        with live:
            draw(logits, torch.empty(len(logits)), config.temperature, config.top_p, config.top_k)
    return live.peak + Counter({LM_HEAD: logits.untyped_storage().nbytes()})


def make_model(workload: Workload, num_layers: int, checkpointing: bool = False, device: str = "meta") -> Policy:
    """Build the model of a pass with `num_layers` layers, in training mode."""
    attention: dict[str, Any] = {}
    if (name := workload.recipe.model.get("attn_implementation")) is not None:
        # Flash attention has no CPU kernel. sdpa keeps the same tensors.
        attention = {"attn_implementation": "sdpa" if "flash" in name else name}
    with torch.device(device):
        model = build(workload.config, workload.recipe, num_layers, **attention)
    if workload.recipe.stage == "rloo" and workload.rloo.cast_lm_head_to_fp32:
        compute_head_in_float32(model)
    model.train()
    if checkpointing and workload.recipe.stage == "rloo":
        model.activation_checkpointing_enable()
    elif checkpointing:
        cast(PreTrainedModel, model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        if isinstance(model, PeftModel):
            cast(PreTrainedModel, model.get_base_model()).enable_input_require_grads()
    return model


def _logprobs(workload: Workload, model: Policy) -> CompletionLogprobs:
    return CompletionLogprobs(
        model,
        temperature=1.0,
        num_tokens=workload.config.vocab_size,
        # This runs on a CPU, also for a plan of a GPU.
        logit_bytes_at_once=LOGIT_BYTES_AT_ONCE["cpu" if workload.is_cpu else "cuda"],
        fused_lm_head=workload.rloo.fused_lm_head,
    )


def _packed(workload: Workload) -> PackedCompletions:
    packed = _pack(workload)
    if not workload.is_cpu:
        packed = replace(packed, layout=_OneSequence(packed.layout.position_ids))
    if workload.sequence_parallel == 1:
        return packed
    last = _LastOfGroup(size=workload.sequence_parallel, index=workload.sequence_parallel - 1, group=None)  # type: ignore[arg-type]  # it exchanges nothing
    with unset_fake_temporarily():  # a fake tensor cannot say which tokens are of the last slice
        own = split_tokens(_pack(workload), last)
    return replace(
        own,
        input_ids=torch.zeros(own.input_ids.shape, dtype=torch.long),
        predictors=torch.zeros(own.predictors.shape, dtype=torch.long),
        targets=torch.zeros(own.targets.shape, dtype=torch.long),
        layout=SlicedLayout(packed.layout, last),
        put_together=lambda logprobs_T: logprobs_T,
    )


def _pack(workload: Workload) -> PackedCompletions:
    parts = workload.largest_micro_batch
    completion = [0] * workload.rloo.max_completion_length
    return pack_completions(
        [[0] * workload.prompt_tokens] * len(parts),
        [[completion] * len(part.members) for part in parts],
        torch.device("cpu"),
        is_shared=[part.is_shared for part in parts],
        multiple_of=workload.sequence_parallel,
    )


def _part_of(workload: Workload) -> Callable[[Tensor], str]:
    vocab_size = workload.config.get_text_config().vocab_size
    return lambda tensor: LM_HEAD if tensor.dim() > 1 and tensor.shape[-1] == vocab_size else ACTIVATIONS


def _head_kernels(workload: Workload) -> AbstractContextManager[Any]:
    return nullcontext() if workload.is_cpu else kernels_of_a_gpu()


def _autocast(workload: Workload) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if workload.autocasts else nullcontext()


class _LastOfGroup(SequenceGroup):
    """The last process of a sequence group, without the others: prompts come first, so it scores the most tokens."""

    def exchange(self, states: Tensor) -> Tensor:
        """Allocate what an exchange allocates, forward and backward."""
        return cast(Tensor, _Copied.apply(states.contiguous()))


class _Copied(torch.autograd.Function):
    """A copy whose gradient is a copy, too."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:  # autograd's own
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous().clone()


class _OneSequence:
    """Attention as if all tokens were one causal sequence: a fused kernel keeps the same tensors for every mask."""

    def __init__(self, position_ids: Tensor) -> None:
        self.position_ids = position_ids

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2)
