"""One step of RLOO: its gradient is the one that its records say, whatever the batching, and equal to TRL's."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from data.chat import Ending, encode_text
from data.rows import Row
from rewards.compose import RewardFunction
from trainer.prompts import Prompt, step_prompts
from trainer.rloo.config import RLOOConfig
from trainer.rloo.logprobs import CompletionLogprobs, Rows
from trainer.rloo.loop import make_reference, take_step
from trainer.rloo.metrics import Clock, RolloutRecord, step_metrics
from trainer.rloo.rollouts import Group
from trainer.rloo.sampler import Completion, Sampler
from trainer.rloo.task import RLOOTask

TEXTS = [
    "human: What is 2+2? <sep> assistant:",
    "human: 17 + 25 = <sep> assistant:",
    "human: Name a colour. <sep> assistant:",
    "human: a <sep> assistant:",
    "human: Be brief. <sep> assistant:",
]
TEMPERATURE = 0.8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Gradient = dict[str, Tensor]


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


@pytest.fixture
def policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The tiny model with the tokenizer's vocabulary, made to end about every tenth token with eos."""
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.5
    return model


def with_adapter(policy: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(policy, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))


def perturb(policy: torch.nn.Module, scale: float = 0.05) -> None:
    """Move every trained weight, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)


def make_task(
    tokenizer: PreTrainedTokenizerFast, reward: Callable[..., list[float | None]] = by_ids, **settings: Any
) -> RLOOTask:
    prompts = [
        Prompt(
            text=text,
            ids=encode_text(text, tokenizer),
            row=Row(messages=[{"role": "user", "content": text}], where=f"prompts.jsonl:{line}"),
        )
        for line, text in enumerate(TEXTS, start=1)
    ]
    defaults = {"max_steps": 1, "prompts_per_step": len(TEXTS), "num_generations": 4, "max_completion_length": 8}
    config = RLOOConfig(**{**defaults, "temperature": TEMPERATURE, "beta": 0.0, **settings})
    rewards = [RewardFunction(name="reward", weight=2.0, function=reward, columns=())]
    return RLOOTask(config=config, tokenizer=tokenizer, prompts=prompts, rewards=rewards)


def run_step(
    policy: LlamaForCausalLM | PeftModel,
    task: RLOOTask,
    reference: Callable[[Rows], Tensor] | None = None,
    sampler: Any = None,  # anything that samples
) -> tuple[list[RolloutRecord], Gradient]:
    """Records and gradient of the run's first step."""
    model = CompletionLogprobs(policy, temperature=task.config.temperature, num_tokens=len(task.tokenizer)).train()
    sampler = sampler or Sampler(
        policy,
        task.tokenizer,
        max_completion_length=task.config.max_completion_length,
        temperature=task.config.temperature,
        batch_size=64,
    )
    policy.zero_grad()
    records = take_step(Accelerator(cpu=True), model, reference, sampler, task, seed=5, step=0, clock=Clock())
    return records, gradient_of(policy)


def reference_of(policy: LlamaForCausalLM | PeftModel, task: RLOOTask) -> Callable[[Rows], Tensor]:
    model = CompletionLogprobs(policy, temperature=task.config.temperature, num_tokens=len(task.tokenizer)).train()
    reference = make_reference(model, task.config)
    assert reference is not None
    return reference


def gradient_of(policy: torch.nn.Module) -> Gradient:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad and p.grad is not None}


def sequence_logprob(policy: torch.nn.Module, task: RLOOTask, record: RolloutRecord) -> Tensor:
    """log pi(y|x) of a record from one plain forward of its row, with gradient."""
    prompt, completion = encode_text(record["prompt"], task.tokenizer), record["completion_ids"]
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits[:, : len(task.tokenizer)] / task.config.temperature, dim=1)
    return logprobs[range(len(completion)), completion].sum()


def gradient_from_records(policy: torch.nn.Module, task: RLOOTask, records: list[RolloutRecord]) -> Gradient:
    """- sum of advantage * grad log pi over the records, over the number of scorable completions; in float64."""
    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    num_scorable = sum(record["reward"] is not None for record in records)
    for record in records:
        (-record["advantage"] / num_scorable * sequence_logprob(exact, task, record)).backward()
    return gradient_of(exact)


def assert_gradients_close(found: Gradient, expected: Gradient, rtol: float = 1e-5) -> None:
    """Each weight's gradient is right, up to `rtol` of the norm of the whole gradient."""
    norm = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm().item()
    assert norm > 0.01
    assert found.keys() == expected.keys()
    errors = {name: (found[name].double() - g.double()).norm().item() / norm for name, g in expected.items()}
    assert max(errors.values()) <= rtol, errors


def advantages_by_hand(records: list[RolloutRecord], beta: float) -> list[float]:
    """Reward minus beta * kl, minus the mean of the same over the others of its slot that have a reward."""
    advantages = []
    for record in records:
        others = [
            other["reward"] - (beta * other["kl"] if beta else 0.0)
            for other in records
            if other["slot"] == record["slot"] and other is not record and other["reward"] is not None
        ]
        if record["reward"] is None or not others:
            advantages.append(0.0)
        else:
            own = record["reward"] - (beta * record["kl"] if beta else 0.0)
            advantages.append(own - math.fsum(others) / len(others))
    return advantages


def by_completion(records: list[RolloutRecord]) -> list[RolloutRecord]:
    """Records by their place in the step, whatever micro-batch they came with."""
    return sorted(records, key=lambda record: record["slot"])


# The gradient and the advantages


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_the_gradient_is_the_one_of_the_records(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_lora: bool
) -> None:
    trained = with_adapter(policy) if is_lora else policy
    perturb(trained)
    task = make_task(tokenizer)
    records, gradient = run_step(trained, task)
    assert_gradients_close(gradient, gradient_from_records(trained, task, records))

    assert [record["slot"] for record in by_completion(records)] == [slot for slot in range(5) for _ in range(4)]
    assert {record["prompt"] for record in records} == set(TEXTS)
    assert len({len(record["completion_ids"]) for record in records}) > 1
    assert [record["reward"] for record in records] == [
        pytest.approx(2 * (sum(record["completion_ids"]) % 7 / 7)) for record in records
    ]
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0), abs=1e-6)
    for record in records:
        expected = sequence_logprob(trained, task, record).item()
        assert record["sampler_logprob"] == pytest.approx(expected, abs=1e-4)
        assert record["kl"] is None
        assert record["logprob"] is None or record["logprob"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_with_a_kl_penalty_rewards_are_regularised_within_the_baseline(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_lora: bool, is_checkpointing: bool
) -> None:
    beta = 0.3
    task = make_task(tokenizer, beta=beta, micro_batch_tokens=300)
    initial = copy.deepcopy(policy)
    trained = with_adapter(policy) if is_lora else policy
    if is_checkpointing:
        trained.activation_checkpointing_enable()
    reference = reference_of(trained, task)
    perturb(trained)
    records, gradient = run_step(trained, task, reference)

    kls = [record["kl"] for record in records]
    expected_kls = [
        (sequence_logprob(trained, task, record) - sequence_logprob(initial, task, record)).item() for record in records
    ]
    assert kls == pytest.approx(expected_kls, abs=1e-4)
    assert max(map(abs, kls)) > 0.1
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    assert_gradients_close(gradient, gradient_from_records(trained, task, records))


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_the_reference_is_the_policy_bit_for_bit_before_the_first_update(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_lora: bool, is_checkpointing: bool
) -> None:
    trained = with_adapter(policy) if is_lora else policy
    if is_checkpointing:
        trained.activation_checkpointing_enable()
    task = make_task(tokenizer, beta=0.3)
    records, _ = run_step(trained, task, reference_of(trained, task))
    assert [record["kl"] for record in records] == [0.0] * 20
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0), abs=1e-6)


def test_without_beta_there_is_no_reference(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task(tokenizer, beta=0.0)
    model = CompletionLogprobs(policy, temperature=1.0, num_tokens=len(tokenizer))
    assert make_reference(model, task.config) is None


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_micro_batches_of_any_size_give_the_same_step(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beta: float
) -> None:
    policy.double()
    steps = []
    for budget in (1, 150, 400, 10**6):
        trained = copy.deepcopy(policy)
        task = make_task(tokenizer, sometimes_none, beta=beta, micro_batch_tokens=budget)
        reference = reference_of(trained, task) if beta else None
        perturb(trained)
        records, gradient = run_step(trained, task, reference)
        steps.append((by_completion(records), gradient))
    (expected_records, expected), *others = steps
    for records, gradient in others:
        assert [r["completion_ids"] for r in records] == [r["completion_ids"] for r in expected_records]
        assert [r["advantage"] for r in records] == pytest.approx([r["advantage"] for r in expected_records], abs=1e-5)
        assert_gradients_close(gradient, expected)


def test_unscorable_completions_are_excluded(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task(tokenizer, sometimes_none)
    records, gradient = run_step(policy, task)
    unscorable = [record for record in records if record["reward"] is None]
    assert 0 < len(unscorable) < len(records)
    assert all(record["advantage"] == 0 for record in unscorable)
    assert all((record["rewards"]["reward"] is None) == (record["reward"] is None) for record in records)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0), abs=1e-6)
    assert_gradients_close(gradient, gradient_from_records(policy, task, records))


def test_unscorable_completions_have_no_pull_through_the_kl(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = make_task(tokenizer, sometimes_none, beta=0.3)
    reference = reference_of(policy, task)
    perturb(policy)
    records, gradient = run_step(policy, task, reference)
    assert any(record["reward"] is None for record in records)
    assert all(record["advantage"] == 0 for record in records if record["reward"] is None)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, 0.3), abs=1e-5)
    assert_gradients_close(gradient, gradient_from_records(policy, task, records))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_step_that_cannot_be_scored_moves_nothing(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beta: float
) -> None:
    task = make_task(tokenizer, never, beta=beta)
    records, gradient = run_step(policy, task, reference_of(policy, task) if beta else None)
    assert [record["advantage"] for record in records] == [0.0] * 20
    assert set(gradient) == {name for name, _ in policy.named_parameters()}
    assert all(torch.count_nonzero(value) == 0 for value in gradient.values())


def count_scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of the policy from now on."""
    counts: list[int] = []
    forward = CompletionLogprobs.forward

    def counting(self: CompletionLogprobs, rows: Rows) -> Tensor:
        counts.append(len(rows.lengths))
        return forward(self, rows)

    monkeypatch.setattr(CompletionLogprobs, "forward", counting)
    return counts


@pytest.mark.parametrize("reward", [for_some_prompts, lambda prompts, **_: [0.7] * len(prompts)], ids=["some", "all"])
def test_skipping_idle_groups_changes_no_gradient(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    reward: Callable[..., list[float | None]],
) -> None:
    counts = count_scored_rows(monkeypatch)
    task = make_task(tokenizer, reward)
    records, gradient = run_step(policy, task)
    monkeypatch.setattr(Group, "is_idle", False)
    all_records, expected = run_step(policy, task)
    # The first group is always run, so that every process takes part in the backward pass.
    idle_slots = {slot for slot in range(1, 5) if len({r["reward"] for r in records if r["slot"] == slot}) == 1}
    assert len(idle_slots) >= 2
    assert counts == [(5 - len(idle_slots)) * 4, 5 * 4]
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=0, atol=1e-5)

    for record, other in zip(by_completion(records), by_completion(all_records), strict=True):
        is_idle = record["slot"] in idle_slots
        assert (record["logprob"] is None) == is_idle
        assert other["advantage"] == pytest.approx(record["advantage"], abs=1e-6)
        unlike = {"logprob": None, "advantage": None}
        assert record | unlike == other | unlike


def test_with_a_kl_penalty_no_group_is_idle(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tokenizer, for_some_prompts, beta=0.3)
    reference = reference_of(policy, task)
    perturb(policy)
    counts = count_scored_rows(monkeypatch)
    records, gradient = run_step(policy, task, reference)
    assert counts == [20, 20]  # the reference and the policy
    assert all(record["advantage"] != 0 for record in records)
    assert_gradients_close(gradient, gradient_from_records(policy, task, records))


def test_other_steps_and_seeds_sample_anew(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    task = make_task(tokenizer)
    model = CompletionLogprobs(policy, temperature=TEMPERATURE, num_tokens=len(tokenizer)).train()
    sampler = Sampler(policy, tokenizer, max_completion_length=8, temperature=TEMPERATURE, batch_size=8)

    def sampled(seed: int, step: int) -> list[tuple]:
        records = take_step(Accelerator(cpu=True), model, None, sampler, task, seed=seed, step=step, clock=Clock())
        assert {record["step"] for record in records} == {step + 1}
        return [(record["prompt"], *record["completion_ids"]) for record in records]

    assert sampled(5, 0) == sampled(5, 0)
    assert len({tuple(sampled(seed, step)) for seed, step in [(5, 0), (5, 1), (6, 0)]}) == 3


# TRL's RLOOTrainer on the same ids and rewards


class GradientProbe(TrainerCallback):
    """Keeps the gradient that the optimizer is about to apply."""

    def __init__(self) -> None:
        self.gradient: Gradient = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # noqa: ANN001
        self.gradient = gradient_of(model)


class RecordedSampler:
    """Gives each prompt the completions that TRL sampled for it."""

    def __init__(self, groups: dict[tuple[int, ...], list[list[int]]], eos_id: int) -> None:
        self.groups = groups
        self.eos_id = eos_id

    def sample(self, prompts: list[list[int]], keys: object, num_generations: int) -> list[list[Completion]]:
        assert all(len(self.groups[tuple(prompt)]) == num_generations for prompt in prompts)
        return [
            [
                Completion(
                    ids=ids, logprobs=[0.0] * len(ids), ending=Ending.EOS if ids[-1] == self.eos_id else Ending.LENGTH
                )
                for ids in self.groups[tuple(prompt)]
            ]
            for prompt in prompts
        ]


@pytest.mark.parametrize(
    ("beta", "is_lora", "reward"),
    [
        (0.0, False, by_ids),
        (0.0, True, by_ids),
        (0.3, False, by_ids),
        (0.3, True, by_ids),
        (0.3, False, sometimes_none),
    ],
    ids=["full", "lora", "full-kl", "lora-kl", "unscorable"],
)
def test_advantages_and_gradient_equal_trls(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    beta: float,
    is_lora: bool,
    reward: Callable[..., list[float | None]],
) -> None:
    # Both sum log-probabilities and KL over a sequence and average over sequences. For the numbers to be equal,
    # - TRL's ratio to its own old log-probabilities must be 1 (one update a batch), where its clipped objective has the
    #   gradient of the log-probability;
    # - normalize_advantages and mask_truncated_completions must be off, as they are by default;
    # - the model must have no ids beyond the tokenizer's: TRL normalises over all logits;
    # - completions must end at eos and at the length, not at `<sep>`, which TRL does not look for;
    # - the reference must be what TRL loads from disk again by name: here the model before it was perturbed.
    # One difference is meant: TRL divides by all rows, we divide by the scorable ones.
    from trl import RLOOConfig as TRLConfig
    from trl import RLOOTrainer as TRLTrainer

    def load_initial() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    policy.save_pretrained(tmp_path / "model")
    trained = with_adapter(load_initial()) if is_lora else load_initial()
    task = make_task(tokenizer, reward, beta=beta)
    reference = reference_of(trained, task) if beta else None
    perturb(trained)

    sampled: list[tuple[str, list[int]]] = []

    def recording(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float | None]:
        sampled.extend(zip(prompts, completion_ids, strict=True))
        return [None if value is None else 2.0 * value for value in reward(completion_ids=completion_ids)]

    probe = GradientProbe()
    trainer = TRLTrainer(
        model=load_initial(),
        reward_funcs=recording,
        args=TRLConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=20,
            num_generations=4,
            max_completion_length=8,
            max_steps=1,
            beta=beta,
            temperature=TEMPERATURE,
            max_grad_norm=1e9,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=copy.deepcopy(tokenizer),  # it is given a pad token
        callbacks=[probe],
        # An adapter that TRL does not make itself would be its own reference.
        peft_config=trained.peft_config["default"] if is_lora else None,
    )
    trainer.model.load_state_dict(trained.state_dict())
    trainer.train()
    metrics = trainer.state.log_history[0]
    assert metrics["clip_ratio/region_mean"] == 0

    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, ids in sampled:
        groups.setdefault(tuple(encode_text(prompt, tokenizer)), []).append(ids)
    records, gradient = run_step(trained, task, reference, RecordedSampler(groups, tokenizer.eos_token_id))

    # What TRL prints in its table of completions, in the order in which it called the reward.
    advantages = {
        (prompt, *ids): advantage for (prompt, ids), advantage in zip(sampled, trainer._logs["advantages"], strict=True)
    }
    assert len(records) == 20
    for record in records:
        expected = advantages[record["prompt"], *record["completion_ids"]]
        assert record["advantage"] == pytest.approx(expected, abs=1e-5)
    if beta:
        assert max(abs(record["kl"]) for record in records) > 0.1
        num_tokens = sum(len(record["completion_ids"]) for record in records)
        assert metrics["kl"] == pytest.approx(sum(record["kl"] for record in records) / num_tokens, abs=1e-5)
    num_scorable = sum(record["reward"] is not None for record in records)
    assert (num_scorable < 20) == (reward is sometimes_none)
    expected_gradient = {name: value * 20 / num_scorable for name, value in probe.gradient.items()}
    assert_gradients_close(gradient, expected_gradient, rtol=1e-4)


# Which prompts a step samples


@given(num_prompts=st.integers(1, 20), prompts_per_step=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_each_pass_samples_every_prompt_once(num_prompts: int, prompts_per_step: int, seed: int) -> None:
    num_steps = -(-3 * num_prompts // prompts_per_step)
    steps = [
        step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step) for step in range(num_steps)
    ]
    assert all(len(chosen) == prompts_per_step for chosen in steps)
    stream = [prompt for chosen in steps for prompt in chosen]
    for first in range(0, 3 * num_prompts, num_prompts):
        assert sorted(stream[first : first + num_prompts]) == list(range(num_prompts))
    # A resumed run asks for later steps only, and for any of them again.
    for step in reversed(range(num_steps)):
        assert step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step) == steps[step]


def test_the_stream_of_prompts_does_not_depend_on_the_size_of_a_step() -> None:
    def stream(prompts_per_step: int) -> list[int]:
        return [
            prompt
            for step in range(60 // prompts_per_step)
            for prompt in step_prompts(7, seed=3, step=step, prompts_per_step=prompts_per_step)
        ]

    assert stream(1) == stream(4) == stream(10) == stream(60)


def test_each_pass_and_each_seed_has_its_own_order() -> None:
    passes = [step_prompts(50, seed=seed, step=step, prompts_per_step=50) for seed in (0, 1) for step in range(3)]
    assert len({tuple(order) for order in passes}) == 6
    assert list(range(50)) not in passes


# Metrics


def record(slot: int, rewards: dict[str, float | None], reward: float | None, **others: Any) -> RolloutRecord:
    defaults = {"completion_ids": [1, 2], "ending": "stop", "kl": None, "logprob": -2.0, "sampler_logprob": -2.0}
    return {"slot": slot, "rewards": rewards, "reward": reward, **defaults, **others}


def test_metrics_worked_out_by_hand() -> None:
    records = [
        record(0, {"a": 1.0, "b": None}, 1.0, kl=0.5, completion_ids=[1, 2, 3], sampler_logprob=-6.0, logprob=-6.5),
        record(0, {"a": 0.0, "b": 2.0}, 4.0, kl=-0.25, ending="eos", completion_ids=[1], sampler_logprob=-1.0),
        record(1, {"a": 1.0, "b": None}, 1.0, kl=1.0, ending="length", logprob=None),
        record(1, {"a": None, "b": None}, None, kl=None, sampler_logprob=-3.0, logprob=None),
        record(2, {"a": 1.0, "b": None}, 1.0, kl=0.75),
        record(2, {"a": 1.0, "b": None}, 1.0, kl=0.0, logprob=-2.25),
    ]
    assert step_metrics(records) == pytest.approx(
        {
            "reward": 8 / 5,  # of 1, 4, 1, 1, 1
            "reward_std": 1.2,
            "reward/a": 4 / 5,
            "none/a": 1 / 6,
            "reward/b": 2.0,
            "none/b": 5 / 6,
            "share_zero_variance": 2 / 3,  # alone in being scorable teaches nothing either
            "kl": 2 / 5,
            "entropy": 16 / 12,
            "sampler_mismatch": (0.5 + 1.0 + 0.0 + 0.25) / 4,
            "completion_length": 12 / 6,
            "share_stop": 4 / 6,
            "share_eos": 1 / 6,
            "share_length": 1 / 6,
        }
    )


def test_metrics_of_what_nobody_has_are_none() -> None:
    metrics = step_metrics([record(0, {"a": None}, None, logprob=None), record(0, {"a": None}, None, logprob=None)])
    assert [name for name, value in metrics.items() if value is None] == [
        "reward",
        "reward_std",
        "reward/a",
        "kl",
        "sampler_mismatch",
    ]
    assert metrics["none/a"] == 1
    assert metrics["share_zero_variance"] == 1


@pytest.mark.parametrize(
    ("rewards", "is_zero_variance"),
    [([1, 1, 1], True), ([1, 0, 1], False), ([None, None, None], True), ([1, 1, None], True), ([1, None, 0], False)],
)
def test_a_group_whose_rewards_are_all_equal_has_no_variance(
    rewards: list[float | None], is_zero_variance: bool
) -> None:
    metrics = step_metrics([record(0, {"a": reward}, reward) for reward in rewards])
    assert metrics["share_zero_variance"] == is_zero_variance


def test_metrics_of_a_step_are_made_from_its_records(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records, _ = run_step(policy, make_task(tokenizer, for_some_prompts))
    metrics = step_metrics(records)
    assert metrics["share_zero_variance"] == pytest.approx(3 / 5)
    assert metrics["sampler_mismatch"] < 1e-4
    assert metrics["reward"] == pytest.approx(sum(record["reward"] for record in records) / 20)
    assert re.fullmatch(r"prompts\.jsonl:[1-5]", records[0]["row"])
