"""Steps of RLOO on a tiny Llama for the tests, and what they should give, by one plain float64 forward a completion."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.data.rows import Row
from rekatrain.rewards.compose import RewardFunction
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, PackedCompletions, make_reference
from rekatrain.trainer.rloo.loss import clipped_surrogates, sequence_weights
from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.setup import RunSetup
from rekatrain.trainer.rloo.step import Run, take_step

TEXTS = [
    "human: What is 2+2? <sep> assistant:",
    "human: 17 + 25 = <sep> assistant:",
    "human: Name a colour. <sep> assistant:",
    "human: a <sep> assistant:",
    "human: Be brief. <sep> assistant:",
]
TEMPERATURE = 0.8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Policy = LlamaForCausalLM | PeftModel
Gradient = dict[str, Tensor]


class AnySampler(Protocol):
    """What `take_step` asks of a sampler."""

    def sample(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[int, ...]], num_generations: int, *_: object
    ) -> list[list[Completion]]: ...


# Rewards


def by_ids(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """A reward that varies within every group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def sometimes_none(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else sum(ids) % 7 / 7 for ids in completion_ids]


def never(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    return [None] * len(completion_ids)


def for_some_prompts(prompts: Sequence[str], completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Every completion of three prompts earns the same."""
    return [
        sum(ids) % 7 / 7 if prompt in TEXTS[:2] else 0.5 for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


# Policies


def with_adapter(policy: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(policy, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))


def perturb(policy: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def open_reasoning(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Have the model begin many completions, not all, with ` <reasoning>`: each token of it calls for the next."""
    calls = list(pairwise(encode_text("assistant: <reasoning>", tokenizer)[-4:]))
    assert tokenizer.decode([called for _, called in calls]) == " <reasoning>"
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for direction, (caller, called) in enumerate(calls, start=1):
            embeddings[:, direction] = head[:, direction] = 0
            embeddings[caller, direction] = 20
            head[called, direction] = 1.1 if direction == 1 else 3.0


# The objective


def doubles(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(objective: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(objective, parameter, retain_graph=True)[0]


def centred(rewards_PG: Tensor) -> Tensor:
    return rewards_PG - rewards_PG.mean(dim=1, keepdim=True)


def loss_on_policy(
    logprobs_T: Tensor, advantages_N: Tensor, lengths_N: Tensor | None = None, num_completions: int | None = None
) -> Tensor:
    """The default loss, as a step makes it of the functions on the page; lengths are 1 unless given."""
    lengths_N = torch.ones(len(advantages_N), dtype=torch.long) if lengths_N is None else lengths_N
    surrogates_N, _ = clipped_surrogates(
        logprobs_T - logprobs_T.detach(), advantages_N, lengths_N, level="sequence", epsilon=torch.inf
    )
    num_completions = len(advantages_N) if num_completions is None else num_completions
    weights_N = sequence_weights(lengths_N, "sequence_sum", num_completions=num_completions, num_tokens=0)
    return -(surrogates_N * weights_N).sum()


# Steps


def make_task(
    tokenizer: PreTrainedTokenizerFast,
    reward: Callable[..., list[float | None]] = by_ids,
    texts: Sequence[str] = TEXTS,
    **settings: Any,
) -> RunSetup:
    prompts = [
        Prompt(
            text=text,
            ids=encode_text(text, tokenizer),
            row=Row(messages=[{"role": "user", "content": text}], where=f"prompts.jsonl:{line}"),
        )
        for line, text in enumerate(texts, start=1)
    ]
    defaults = {"max_steps": 1, "prompts_per_step": len(TEXTS), "num_generations": 4, "max_completion_length": 8}
    config = RLOOConfig(**{**defaults, "temperature": TEMPERATURE, "beta": 0.0, **settings})
    rewards = [RewardFunction(name="reward", weight=2.0, function=reward, columns=())]
    return RunSetup(config=config, tokenizer=tokenizer, prompts=prompts, rewards=rewards)


def scorer_of(policy: Policy, task: RunSetup) -> CompletionLogprobs:
    return CompletionLogprobs(policy, temperature=task.config.temperature, num_tokens=len(task.tokenizer)).train()


def reference_of(policy: Policy, task: RunSetup) -> Callable[[PackedCompletions], Tensor]:
    reference = make_reference(Accelerator(cpu=True), scorer_of(policy, task), task.config)
    assert reference is not None
    return reference


def gradient_of(policy: torch.nn.Module) -> Gradient:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad and p.grad is not None}


def run_updates(
    policy: Policy,
    task: RunSetup,
    reference: Callable[[PackedCompletions], Tensor] | None = None,
    sampler: AnySampler | None = None,
    *,
    change: Callable[[], object] = lambda: None,
    step: int = 0,
    seed: int = 5,
) -> tuple[list[RolloutRecord], list[Gradient]]:
    """Records of a step and the gradient of each of its updates; `change` is what an update does to the weights."""
    gradients = []

    def update() -> None:
        gradients.append(gradient_of(policy))
        change()
        policy.zero_grad()

    policy.zero_grad()
    run = Run.in_process(
        Accelerator(cpu=True),
        scorer_of(policy, task),
        replace(task, seed=seed),
        sampler or task.make_sampler(policy),
        update,
        reference,
    )
    return take_step(run, step, Clock()), gradients


def run_step(
    policy: Policy,
    task: RunSetup,
    reference: Callable[[PackedCompletions], Tensor] | None = None,
    sampler: AnySampler | None = None,
) -> tuple[list[RolloutRecord], Gradient]:
    """Records and gradient of the run's first step, which is one update."""
    records, (gradient,) = run_updates(policy, task, reference, sampler)
    return records, gradient


class KeepingSampler:
    """Keeps what another sampler gave, by its prompt and its ids; `noise` is added to what it says of its logprobs."""

    def __init__(self, sampler: AnySampler, noise: float = 0.0) -> None:
        self._sampler = sampler
        self._noise = noise
        self._generator = torch.Generator().manual_seed(0)
        self.kept: dict[tuple[int, ...], Completion] = {}

    def sample(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[int, ...]], num_generations: int, *_: object
    ) -> list[list[Completion]]:
        groups = [
            [self._noisy(completion) for completion in group]
            for group in self._sampler.sample(prompts, keys, num_generations)
        ]
        for prompt, group in zip(prompts, groups, strict=True):
            self.kept |= {(*prompt, *completion.ids): completion for completion in group}
        return groups

    def _noisy(self, completion: Completion) -> Completion:
        # By its ids, so that a completion that is drawn twice has the same noise.
        self._generator.manual_seed(hash(tuple(completion.ids)) % 2**32)
        noise = self._noise * torch.randn(len(completion.ids), generator=self._generator)
        return replace(completion, logprobs=(torch.tensor(completion.logprobs) + noise).tolist())

    def completion(self, task: RunSetup, record: RolloutRecord) -> Completion:
        return self.kept[(*encode_text(record["prompt"], task.tokenizer), *record["completion_ids"])]


# What a step should give


def token_logprobs(policy: torch.nn.Module, task: RunSetup, record: RolloutRecord) -> Tensor:
    """log pi of each token of a record's completion from one plain forward of its row, with gradient -> [T]."""
    prompt, completion = encode_text(record["prompt"], task.tokenizer), record["completion_ids"]
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits[:, : len(task.tokenizer)] / task.config.temperature, dim=1)
    return logprobs[range(len(completion)), completion]


def sequence_logprob(policy: torch.nn.Module, task: RunSetup, record: RolloutRecord) -> Tensor:
    return token_logprobs(policy, task, record).sum()


def exact_copy(policy: Policy) -> Policy:
    """The policy in float64, without a gradient."""
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    return exact


def gradient_of_terms(
    policy: Policy, task: RunSetup, records: list[RolloutRecord], term: Callable[[RolloutRecord, Tensor], Tensor]
) -> Gradient:
    """Gradient of a sum over records of `term(record, its token log-probabilities)`, in float64."""
    exact = exact_copy(policy)
    for record in records:
        term(record, token_logprobs(exact, task, record)).backward()
    return gradient_of(exact)


def gradient_from_records(policy: Policy, task: RunSetup, records: list[RolloutRecord]) -> Gradient:
    """- sum of advantage * grad log pi over the records, over the number of scorable completions."""
    num_scorable = sum(record["reward"] is not None for record in records)
    return gradient_of_terms(
        policy, task, records, lambda record, logprobs_T: -record["advantage"] / num_scorable * logprobs_T.sum()
    )


def assert_gradients_close(found: Gradient, expected: Gradient, rtol: float = 1e-5) -> None:
    """Each weight's gradient is right, up to `rtol` of the norm of the whole gradient."""
    norm = norm_of(expected)
    assert norm > 0.01
    assert found.keys() == expected.keys()
    errors = {name: (found[name].double() - g.double()).norm().item() / norm for name, g in expected.items()}
    assert max(errors.values()) <= rtol, errors


def norm_of(gradient: Gradient) -> float:
    return torch.stack([value.double().norm() for value in gradient.values()]).norm().item()


def distance(one: Gradient, other: Gradient) -> float:
    """Norm of the difference over the norm of `other`."""
    return norm_of({name: one[name].double() - value.double() for name, value in other.items()}) / norm_of(other)


def advantages_by_hand(records: list[RolloutRecord], beta: float = 0.0) -> list[float]:
    """Reward minus beta * kl, minus the mean of the same over the others of its prompt_index that have a reward."""
    advantages = []
    for record in records:
        others = [
            other["reward"] - (beta * other["kl"] if beta else 0.0)
            for other in records
            if other["prompt_index"] == record["prompt_index"] and other is not record and other["reward"] is not None
        ]
        if record["reward"] is None or not others:
            advantages.append(0.0)
        else:
            own = record["reward"] - (beta * record["kl"] if beta else 0.0)
            advantages.append(own - math.fsum(others) / len(others))
    return advantages


def by_completion(records: list[RolloutRecord]) -> list[RolloutRecord]:
    """Records by their place in the step, whatever micro-batch they came with."""
    return sorted(records, key=lambda record: record["prompt_index"])
