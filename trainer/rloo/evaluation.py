"""Held-out accuracy while RLOO trains: `rloo.eval_steps` and `rloo.eval_on_start`, with the settings of `evaluate:`.

The training processes sample, or their servers do, each process a part of the held-out prompts. The draws are those of
`rekatrain evaluate` and the same at every step, so two steps differ by their weights alone, and training is the same
with and without evaluation.
"""

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from rekatrain.rewards.grader import Grader
from rekatrain.trainer.evaluation.metrics import evaluation_metrics
from rekatrain.trainer.held_out_prompts import EvaluateConfig, HeldOut
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.processes.interruption import INTERRUPTION, Abandoned
from rekatrain.trainer.rloo.distributed import whole_weights, zero_stage
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.rollouts import GroupSampler, abandonable, sample_groups
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from rekatrain.trainer.rloo.sampler.vllm.server_rollouts import ServerRollouts
from rekatrain.trainer.rloo.setup import RunSetup

logger = logging.getLogger(__name__)

HEADLINE = ["eval/accuracy", "eval/completions/mean_length"]


class Evaluation:
    """Samples and grades answers to the held-out prompts with the policy in training."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        policy: Policy,
        setup: RunSetup,
        servers: ServerRollouts | None = None,
    ) -> None:
        """Prepare; `model` is the policy as Accelerate has prepared it, and `servers` sample, if there are any."""
        self._accelerator, self._policy, self._setup, self._servers = accelerator, policy, setup, servers
        self._weights = partial(whole_weights, model) if zero_stage(accelerator) == 3 else nullcontext

    def is_due(self, step: int) -> bool:
        """Return True if the recipe wants an evaluation after `step` steps."""
        config = self._setup.config
        if step == 0:
            return config.eval_on_start
        return config.eval_steps is not None and (step % config.eval_steps == 0 or step == config.max_steps)

    def __call__(self, step: int) -> dict[str, float | None]:
        """Return the metrics of the policy after `step` steps; nothing if it fails or the run is interrupted.

        Every process must call this. An evaluation that fails is logged, and the run goes on.
        """
        held_out = self._setup.held_out
        assert held_out is not None, "the recipe is checked for eval_dataset"
        try:
            if self._servers is not None:
                served = self._servers.sampler_of(held_out.config, step)
                answers, failure = abandonable(self._accelerator, partial(self._try_to_answer, held_out, served))
                self._servers.rest()
            else:
                with self._weights():
                    own = self._make_sampler(held_out.config)
                    answers, failure = abandonable(self._accelerator, partial(self._try_to_answer, held_out, own))
        except Abandoned:
            return {}
        failures = [text for text in gather_object([failure]) if text is not None]
        everything = gather_object(answers)
        if failures:
            logger.warning("step %d: the held-out prompts could not be evaluated: %s", step, failures[0])
            return {}
        return evaluation_metrics(everything, held_out.config)

    def _try_to_answer(self, held_out: HeldOut, sampler: GroupSampler) -> tuple[list[dict[str, Any]], str | None]:
        try:
            return self._answer(held_out, sampler), None
        # An evaluation is worth less than the run: whatever goes wrong in it is reported, and the run goes on.
        except Exception as error:
            return [], f"{type(error).__name__}: {error}"

    def _make_sampler(self, config: EvaluateConfig) -> Sampler:
        return Sampler(
            self._policy,
            self._setup.tokenizer,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            batch_size=config.per_device_generation_batch_size,
            dtype=torch.bfloat16 if self._setup.config.bf16 else None,
        )

    def _answer(self, held_out: HeldOut, sampler: GroupSampler) -> list[dict[str, Any]]:
        config = held_out.config
        indices = range(self._accelerator.process_index, len(held_out.prompts), self._accelerator.num_processes)
        # Each grader has separate counts and metrics: those of training stay as they are.
        with Grader(held_out.rewards, self._setup.scoring, unbroken=INTERRUPTION.unbroken) as grader:
            groups = sample_groups(
                sampler,
                grader,
                self._setup.tokenizer,
                [held_out.prompts[index] for index in indices],
                indices,
                seed=self._setup.seed,
                step=0,
                num_generations=config.num_generations,
            )
        return [answer for group in groups for answer in _answers(group)]


def _answers(group: Group) -> list[dict[str, Any]]:
    return [
        {
            "prompt_index": group.prompt_index,
            "index": index,
            "source": group.prompt.row.source.name,
            "num_tokens": len(completion.ids),
            "num_thinking": 0,
            "finish_reason": completion.finish_reason.value,
            "rewards": {name: values[index] for name, values in group.rewards_by_name.items()},
        }
        for index, completion in enumerate(group.completions)
    ]
