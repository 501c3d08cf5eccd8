"""The in-process sampler: completions from the live policy, with string stop, finish reasons and recorded logprobs.

Each prompt is prefilled once, and its group shares that part of the cache. A completion leaves the batch when it ends,
and the next group joins as soon as there is room. Each token is drawn with one uniform number, keyed by (seed, step,
prompt, completion). A completion therefore depends neither on the other completions of its batch nor on the number of
processes. On a GPU decoding steps are replayed as CUDA graphs (decode_step.py).

Shapes: S tokens of all prompts of a batch, N completions that have not ended yet, T tokens of a completion, V tokens of
the vocabulary, D hidden size.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import FinishReason
from rekatrain.data.stop import StopSearch, reasoning_closing
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.cpu import decoding_weights
from rekatrain.trainer.rloo.kernels.grouped_attention import ForkedCache, decoder_and_head, run_decoder
from rekatrain.trainer.rloo.sampler.adapters import decoding_adapters
from rekatrain.trainer.rloo.sampler.decode_step import Calls, CudaGraphs, DecodeStep, Drawn
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.static_cache import StaticCache

# Steps of decoding after which drawn tokens are read: a GPU decodes on meanwhile, and the tokens that it draws for
# completions that have ended are dropped.
NUM_LATE = {"cpu": 0, "cuda": 4}
# Groups whose prompts are in the cache, as a multiple of those of a full batch.
MAX_GROUPS = 2


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled completion.

    ids:           sampled token ids, the last token included (the one that completes `<sep>`, or eos)
    logprobs:      log-probability with which each token was drawn, at the sampling temperature; 0 for forced tokens
    finish_reason: `<sep>` was completed, the eos token was drawn, or the length ran out
    forced:        indices of the tokens that the reasoning budget forced instead of a draw
    versions:      number of updates of the weights that drew each token; empty in process, where they are the step's
    cutoffs:       for each token, the log-prob of the least likely kept token minus this token's, rounded down: at most
                   0, and -inf for forced tokens; empty where no top-k or top-p filter is on
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    forced: range = range(0)
    versions: list[int] = field(default_factory=list)
    cutoffs: list[float] = field(default_factory=list)


class Sampler:
    """Samples groups of completions from a causal language model."""

    _generator = staticmethod(np.random.default_rng)  # of the uniform numbers of one completion, from its key

    def __init__(
        self,
        model: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        temperature: float,
        batch_size: int,
        top_p: float = 1.0,
        top_k: int | None = None,
        reasoning_budget: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Store the sampling settings.

        temperature:      0 is greedy
        batch_size:       number of completions sampled at the same time, in whole groups
        top_p, top_k:     filters of `draw`
        reasoning_budget: tokens after which `</reasoning>` is forced, if `<reasoning>` is still open
        dtype:            dtype in which linear layers compute, as under autocast; None: the dtype of their weights
        """
        self.model = model
        self.max_completion_length = max_completion_length
        self.temperature = temperature
        self.batch_size = batch_size
        self.top_p, self.top_k = top_p, top_k
        self.reasoning_budget = reasoning_budget
        self.dtype = dtype
        # Tests set both to a GPU's, on a CPU. None: steps without fixed memory, for which a CPU has no use.
        self.num_late = NUM_LATE[model.device.type]
        self.make_calls: Callable[[], Calls] | None = CudaGraphs if model.device.type == "cuda" else None
        self._tokenizer = tokenizer
        self._stop = StopSearch(tokenizer)
        self._eos_id = tokenizer.eos_token_id
        # Embeddings are padded beyond the tokenizer (by 75 in Reka Flash 3): those ids mean nothing.
        self._num_tokens = len(tokenizer)

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample a group of `num_generations` completions for each prompt, in the order of the prompts.

        keys:          seeds of the draws, one key per prompt
        on_completion: called as soon as a completion ends, with its index in the flattened result; not called for
                       completions that run out of length
        """
        num_inputs = min(self.batch_size, len(prompts) * num_generations)
        weights = decoding_weights(self.model, num_inputs, self.dtype)
        adapters = decoding_adapters(self.model) if isinstance(self.model, PeftModel) else nullcontext()
        with torch.no_grad(), _eval_mode(self.model), weights, adapters:
            completions = self._sample_all(prompts, keys, num_generations, on_completion)
        return [completions[at : at + num_generations] for at in range(0, len(completions), num_generations)]

    def _sample_all(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        num_generations: int,
        on_completion: Callable[[int, Completion], None] | None,
    ) -> list[Completion]:
        """Sample the completions of all prompts; a group joins the batch once as many of its completions have ended."""
        device, (decoder, head) = self.model.device, decoder_and_head(self.model)
        at_once = min(max(1, self.batch_size // num_generations), len(prompts))
        max_prompts = min(MAX_GROUPS * at_once, len(prompts))
        cache: ForkedCache | None = None
        step: DecodeStep | None = None
        partials: dict[int, _PartialCompletion] = {}
        completions: dict[int, Completion] = {}
        live: list[int] = []  # indices of the completions of the batch, in its order
        unread: deque[_Drawn] = deque()
        # Forced tokens depend on all tokens before: those are read at once.
        num_late = 0 if self.reasoning_budget is not None else self.num_late
        num_admitted = 0
        draw_next = partial(
            draw, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, num_tokens=self._num_tokens
        )
        # Pinned memory of the host is sent to a GPU without waiting for what runs there.
        on_host = partial(torch.tensor, dtype=torch.long, pin_memory=device.type == "cuda")
        # Uniform numbers by member of the cache, and the last token of each completion of the batch.
        shape = max_prompts * num_generations, self.max_completion_length
        uniforms_MT = torch.zeros(shape, dtype=torch.float64, device=device)
        last_R = torch.zeros(at_once * num_generations, dtype=torch.long, device=device)
        while live or unread or num_admitted < len(prompts):
            # 1. Prefill: run each prompt once, of all groups that there is room for, and draw their first tokens.
            num_new = min(at_once - -(-len(live) // num_generations), len(prompts) - num_admitted)
            if cache is not None:  # the last completion of each group keeps its prompt in memory
                num_new = min(num_new, max_prompts - cache.num_groups)
            if num_new > 0:
                new = range(num_admitted, num_admitted + num_new)
                num_admitted += num_new
                new_lengths = [len(prompts[index]) for index in new]
                if cache is not None:
                    cache.admit(new_lengths)
                elif self.make_calls is None:
                    cache = ForkedCache(new_lengths, num_generations, self.max_completion_length, device)
                else:
                    room = {"max_prompts": max_prompts, "longest_prompt": max(map(len, prompts))}
                    cache = StaticCache(new_lengths, num_generations, self.max_completion_length, device, **room)
                    step = DecodeStep((decoder, head), cache, draw_next, uniforms_MT, last_R, self.make_calls())
                if num_admitted == len(prompts):
                    cache.close()
                new_ids = on_host([[token for index in new for token in prompts[index]]])
                prompt_ids = new_ids.to(device, non_blocking=True)
                hidden_SD = run_decoder(decoder, prompt_ids, cache.prompts.position_ids, cache)[0]
                last_of_prompts = on_host(new_lengths).cumsum(0).to(device, non_blocking=True) - 1
                logits_NV = head(hidden_SD[last_of_prompts]).repeat_interleave(num_generations, dim=0)
                numbers = [[*keys[index], member] for index in new for member in range(num_generations)]
                uniforms = [self._generator(key).random(self.max_completion_length) for key in numbers]
                new_NT = torch.from_numpy(np.stack(uniforms)).to(device)
                rows = slice(len(live), len(live) + len(new_NT))
                uniforms_MT[cache.members_N[rows]] = new_NT
                drawn = draw_next(logits_NV, new_NT[:, 0])
                last_R[rows] = drawn[0]
                members = range(new.start * num_generations, new.stop * num_generations)
                unread.append(_Drawn(list(members), drawn))
                live = [*live, *members]
                partials |= {index: _PartialCompletion() for index in members}
            assert cache is not None
            # 2. Read the tokens, some steps late on a GPU, which need not wait then. Report completions that ended.
            while unread and (len(unread) > num_late or not live):
                for index, token, logprob, cutoff in unread.popleft().read():
                    if index in completions:  # drawn after its end, which was not yet known
                        continue
                    completion = partials[index]
                    self._append(completion, token, logprob, cutoff)
                    if completion.finish_reason is None and len(completion.ids) < self.max_completion_length:
                        continue
                    completions[index] = Completion(
                        ids=completion.ids,
                        logprobs=completion.logprobs,
                        finish_reason=completion.finish_reason or FinishReason.LENGTH,
                        forced=range(completion.forced_from, completion.forced_from + completion.num_forced),
                        cutoffs=completion.cutoffs,
                    )
                    if on_completion is not None and completion.finish_reason is not None:
                        on_completion(index, completions[index])
            # 3. Remove the completions that ended from the batch, and those that have all their tokens.
            is_last = [length + 1 == self.max_completion_length for length in cache.lengths] if live else []
            unfinished = [at for at, index in enumerate(live) if index not in completions and not is_last[at]]
            if len(unfinished) < len(live):
                order = cache.keep(unfinished)
                live = [live[at] for at in order]
                last_R[: len(live)] = last_R[on_host(order).to(device, non_blocking=True)]
            if not live:
                continue
            # 4. Decode: run the new tokens, and draw the next.
            if self.reasoning_budget is not None:
                last_R[: len(live)] = on_host([partials[index].ids[-1] for index in live])
            if step is not None:
                drawn = step()
            else:
                hidden_ND = run_decoder(decoder, last_R[: len(live), None], cache.position_ids, cache)[:, 0]
                cache.advance()
                drawn = draw_next(head(hidden_ND), uniforms_MT[cache.members_N, cache.lengths_N])
                last_R[: len(live)] = drawn[0]
            unread.append(_Drawn(live, drawn))
        return [completions[index] for index in range(len(completions))]

    def _append(self, partial: "_PartialCompletion", drawn: int, logprob: float, cutoff: float | None) -> None:
        """Append the drawn token, or a forced one instead, and set `finish_reason` if the completion ends with it."""
        if partial.to_force:
            drawn, logprob, cutoff = partial.to_force.pop(0), 0.0, None if cutoff is None else -math.inf
            partial.num_forced += 1
        partial.ids.append(drawn)
        partial.logprobs.append(logprob)
        if cutoff is not None:
            partial.cutoffs.append(cutoff)
        if self._stop.completes_at(partial.ids, len(partial.ids)):
            partial.finish_reason = FinishReason.STOP
        elif drawn == self._eos_id:
            partial.finish_reason = FinishReason.EOS
        elif len(partial.ids) == self.reasoning_budget:
            partial.to_force, partial.forced_from = reasoning_closing(partial.ids, self._tokenizer), len(partial.ids)


@dataclass(kw_only=True)
class _PartialCompletion:
    """A completion that is being sampled.

    to_force:    tokens to append instead of the next draws
    forced_from: index of the first forced token
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cutoffs: list[float] = field(default_factory=list)
    to_force: list[int] = field(default_factory=list)
    num_forced: int = 0
    forced_from: int = 0
    finish_reason: FinishReason | None = None


class _Drawn:
    """Tokens drawn for the completions of a batch, on their way from the device to the host."""

    def __init__(self, live: list[int], drawn: Drawn) -> None:
        self._live = live
        # Copies: the next step may overwrite what this one has drawn. Rows beyond the live completions are unused.
        self._sent = [
            None if tensor is None else tensor[: len(live)].to("cpu", non_blocking=True, copy=True) for tensor in drawn
        ]
        self._arrived = torch.cuda.Event() if drawn[0].is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Iterator[tuple[int, int, float, float | None]]:
        """Yield a completion's index, its token, the token's log-probability and its cutoff."""
        if self._arrived is not None:
            self._arrived.synchronize()
        lists = [[None] * len(self._live) if tensor is None else tensor.tolist() for tensor in self._sent]
        return zip(self._live, *lists, strict=True)


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
