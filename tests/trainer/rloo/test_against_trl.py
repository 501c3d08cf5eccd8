"""Tests of trainer/rloo/step.py against TRL's RLOOTrainer, on the same ids and rewards."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from rekatrain.data.chat import FinishReason, encode_text
from rekatrain.trainer.rloo.sampler.in_process import Completion
from tests.helpers.rloo import (
    TEMPERATURE,
    TEXTS,
    Gradient,
    assert_gradients_close,
    by_ids,
    gradient_of,
    make_setup,
    perturb,
    reference_of,
    run_step,
    sometimes_none,
    with_adapter,
)


class GradientProbe(TrainerCallback):
    """Callback that keeps the gradient that the optimizer is about to apply."""

    def __init__(self) -> None:
        self.gradient: Gradient = {}

    def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **kwargs: object) -> None:
        """Copy the gradient."""
        self.gradient = gradient_of(model)


class ReplayingSampler:
    """Sampler that returns the completions that TRL sampled for each prompt."""

    def __init__(self, groups: dict[tuple[int, ...], list[list[int]]], eos_id: int) -> None:
        self.groups = groups
        self.eos_id = eos_id

    def sample(
        self, prompts: list[list[int]], keys: object, num_generations: int, *_: object
    ) -> list[list[Completion]]:
        """Return the group of each prompt."""
        assert all(len(self.groups[tuple(prompt)]) == num_generations for prompt in prompts)
        return [
            [
                Completion(
                    ids=ids,
                    logprobs=[0.0] * len(ids),
                    finish_reason=FinishReason.EOS if ids[-1] == self.eos_id else FinishReason.LENGTH,
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
def test_take_step_equals_trls_rloo_trainer(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    beta: float,
    is_lora: bool,
    reward: Callable[..., list[float | None]],
) -> None:
    # Both sum log-probabilities and KL over a sequence and average over sequences. For the numbers to be equal,
    # - TRL's ratio to its own old log-probabilities must be 1 (one update per batch), where its clipped objective has
    #   the gradient of the log-probability;
    # - normalize_advantages and mask_truncated_completions must be off, as they are by default;
    # - the model must have no ids beyond the tokenizer's: TRL normalizes over all logits;
    # - completions must end at eos and at the length, not at `<sep>`, which TRL does not look for;
    # - the reference must be what TRL loads from disk again by name: here the model before it was perturbed.
    # One difference is intended: TRL divides by the number of all completions, we divide by that of the scorable ones.
    from trl import RLOOConfig as TRLConfig
    from trl import RLOOTrainer as TRLTrainer

    def load_initial() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    policy.save_pretrained(tmp_path / "model")
    trained = with_adapter(load_initial()) if is_lora else load_initial()
    setup = make_setup(tokenizer, reward, beta=beta)
    reference = reference_of(trained, setup) if beta else None
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
        processing_class=copy.deepcopy(tokenizer),  # TRL sets a pad token on it
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
    records, gradient = run_step(trained, setup, reference, ReplayingSampler(groups, tokenizer.eos_token_id))

    # TRL's table of completions, in the order in which it called the reward.
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
