"""Steps of RLOO on a tiny Llama, and their expected results by one plain float64 forward pass per completion."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

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
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, Reference, make_reference
from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord
from rekatrain.trainer.rloo.rollouts import GroupSampler
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


# Rewards


def by_ids(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Return rewards that vary within every group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def sometimes_none(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Return None for about a third of the completions, and rewards that vary for the others."""
    return [None if sum(ids) % 3 == 0 else sum(ids) % 7 / 7 for ids in completion_ids]


def never(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Return None for every completion."""
    return [None] * len(completion_ids)


def for_some_prompts(prompts: Sequence[str], completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Return rewards that vary for two prompts and are equal for all completions of the three others."""
    return [
        sum(ids) % 7 / 7 if prompt in TEXTS[:2] else 0.5 for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


# Policies


def with_adapter(policy: LlamaForCausalLM) -> PeftModel:
    """Add LoRA to every linear layer, at its start, where it changes nothing."""
    torch.manual_seed(0)
    return get_peft_model(policy, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))


def perturb(policy: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Add noise to every trained weight, as training would change it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def open_reasoning(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make many, not all, completions begin with ` <reasoning>`: each of its tokens makes the next one likely."""
    pairs = list(pairwise(encode_text("assistant: <reasoning>", tokenizer)[-4:]))
    assert tokenizer.decode([following for _, following in pairs]) == " <reasoning>"
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for direction, (token, following) in enumerate(pairs, start=1):
            embeddings[:, direction] = head[:, direction] = 0
            embeddings[token, direction] = 20
            head[following, direction] = 1.1 if direction == 1 else 3.0


# Steps


def make_setup(
    tokenizer: PreTrainedTokenizerFast,
    reward: Callable[..., list[float | None]] = by_ids,
    texts: Sequence[str] = TEXTS,
    **options: Any,
) -> RunSetup:
    """Set up a run of one step on `texts`; `options` are those of RLOOConfig. The reward has a weight of 2."""
    prompts = [
        Prompt(
            text=text,
            ids=encode_text(text, tokenizer),
            row=Row(messages=[{"role": "user", "content": text}], where=f"prompts.jsonl:{line}"),
        )
        for line, text in enumerate(texts, start=1)
    ]
    defaults = {"max_steps": 1, "prompts_per_step": len(TEXTS), "num_generations": 4, "max_completion_length": 8}
    config = RLOOConfig(**{**defaults, "temperature": TEMPERATURE, "beta": 0.0, **options})
    rewards = [RewardFunction(name="reward", weight=2.0, function=reward, columns=())]
    return RunSetup(config=config, tokenizer=tokenizer, prompts=prompts, rewards=rewards)


def make_model(policy: Policy, setup: RunSetup) -> CompletionLogprobs:
    """Wrap the policy as a run does."""
    return CompletionLogprobs(
        policy,
        temperature=setup.config.temperature,
        num_tokens=len(setup.tokenizer),
        fused_lm_head=setup.config.fused_lm_head,
    ).train()


def reference_of(policy: Policy, setup: RunSetup) -> Reference:
    """Make the reference that stays as the policy is now."""
    reference = make_reference(Accelerator(cpu=True), make_model(policy, setup), setup.config)
    assert reference is not None
    return reference


def gradient_of(policy: torch.nn.Module) -> Gradient:
    """Return copies of the gradients of the trained weights."""
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad and p.grad is not None}


def run_updates(
    policy: Policy,
    setup: RunSetup,
    reference: Reference | None = None,
    sampler: GroupSampler | None = None,
    *,
    change: Callable[[], object] = lambda: None,
    step: int = 0,
    seed: int = 5,
) -> tuple[list[RolloutRecord], list[Gradient]]:
    """Take a step -> its records and the gradient of each of its updates; `change` is called to change the weights."""
    gradients = []

    def update() -> None:
        gradients.append(gradient_of(policy))
        change()
        policy.zero_grad()

    policy.zero_grad()
    run = Run.in_process(
        Accelerator(cpu=True),
        make_model(policy, setup),
        replace(setup, seed=seed),
        sampler or setup.make_sampler(policy),
        update,
        reference,
    )
    return take_step(run, step, Clock()), gradients


def run_step(
    policy: Policy,
    setup: RunSetup,
    reference: Reference | None = None,
    sampler: GroupSampler | None = None,
) -> tuple[list[RolloutRecord], Gradient]:
    """Take the first step of the run, which is one update -> its records and its gradient."""
    records, (gradient,) = run_updates(policy, setup, reference, sampler)
    return records, gradient


class RecordingSampler:
    """Sampler that records the completions of another one, with noise of deviation `noise` on their logprobs."""

    def __init__(self, sampler: GroupSampler, noise: float = 0.0) -> None:
        self._sampler = sampler
        self._noise = noise
        self._generator = torch.Generator().manual_seed(0)
        self._recorded: dict[tuple[int, ...], Completion] = {}  # by the ids of the prompt and the completion

    def sample(
        self, prompts: Sequence[list[int]], keys: Sequence[tuple[int, ...]], num_generations: int, *_: object
    ) -> list[list[Completion]]:
        """Sample with the other sampler, then add the noise."""
        groups = [
            [self._noisy(completion) for completion in group]
            for group in self._sampler.sample(prompts, keys, num_generations)
        ]
        for prompt, group in zip(prompts, groups, strict=True):
            self._recorded |= {(*prompt, *completion.ids): completion for completion in group}
        return groups

    def _noisy(self, completion: Completion) -> Completion:
        # Seeded by the ids, so that a completion that is drawn twice has the same noise.
        self._generator.manual_seed(hash(tuple(completion.ids)) % 2**32)
        noise = self._noise * torch.randn(len(completion.ids), generator=self._generator)
        return replace(completion, logprobs=(torch.tensor(completion.logprobs) + noise).tolist())

    def completion(self, setup: RunSetup, record: RolloutRecord) -> Completion:
        """Return the completion of a record."""
        return self._recorded[(*encode_text(record["prompt"], setup.tokenizer), *record["completion_ids"])]


# Expected results of a step


def token_logprobs(policy: torch.nn.Module, setup: RunSetup, record: RolloutRecord) -> Tensor:
    """Compute log pi of each token of a record's completion by one plain forward pass, with gradient -> [T]."""
    prompt, completion = encode_text(record["prompt"], setup.tokenizer), record["completion_ids"]
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits[:, : len(setup.tokenizer)] / setup.config.temperature, dim=1)
    return logprobs[range(len(completion)), completion]


def sequence_logprob(policy: torch.nn.Module, setup: RunSetup, record: RolloutRecord) -> Tensor:
    """Sum `token_logprobs` over the completion -> scalar."""
    return token_logprobs(policy, setup, record).sum()


def exact_copy(policy: Policy) -> Policy:
    """Copy the policy to float64, without gradients."""
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    return exact


def gradient_of_terms(
    policy: Policy, setup: RunSetup, records: list[RolloutRecord], term: Callable[[RolloutRecord, Tensor], Tensor]
) -> Gradient:
    """Differentiate the sum over records of `term(record, its token log-probabilities)`, in float64."""
    exact = exact_copy(policy)
    for record in records:
        term(record, token_logprobs(exact, setup, record)).backward()
    return gradient_of(exact)


def gradient_from_records(policy: Policy, setup: RunSetup, records: list[RolloutRecord]) -> Gradient:
    """Return - sum of advantage * grad log pi over the records, divided by the number of scorable completions."""
    num_scorable = sum(record["reward"] is not None for record in records)
    return gradient_of_terms(
        policy, setup, records, lambda record, logprobs_T: -record["advantage"] / num_scorable * logprobs_T.sum()
    )


def assert_gradients_close(actual: Gradient, expected: Gradient, rtol: float = 1e-5) -> None:
    """Check the gradient of each weight, up to `rtol` of the norm of the whole gradient."""
    norm = norm_of(expected)
    assert norm > 0.01
    assert actual.keys() == expected.keys()
    errors = {name: (actual[name].double() - g.double()).norm().item() / norm for name, g in expected.items()}
    assert max(errors.values()) <= rtol, errors


def norm_of(gradient: Gradient) -> float:
    """Norm over all weights."""
    return torch.stack([value.double().norm() for value in gradient.values()]).norm().item()


def distance(one: Gradient, other: Gradient) -> float:
    """Norm of the difference, divided by the norm of `other`."""
    return norm_of({name: one[name].double() - value.double() for name, value in other.items()}) / norm_of(other)


def advantages_by_hand(records: list[RolloutRecord], beta: float = 0.0) -> list[float]:
    """Return reward - beta * kl of each record, minus its mean over the other scorable records of the prompt."""
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
            penalized = record["reward"] - (beta * record["kl"] if beta else 0.0)
            advantages.append(penalized - math.fsum(others) / len(others))
    return advantages


def by_completion(records: list[RolloutRecord]) -> list[RolloutRecord]:
    """Sort records by their prompt's index in the step, whatever micro-batch they were in."""
    return sorted(records, key=lambda record: record["prompt_index"])
