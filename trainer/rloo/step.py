"""One step of RLOO, from prompts to updated weights. Read `take_step` from top to bottom; loss.py has the objective.

Phases are numbered as in README.md beside this file. Each process samples and trains its part of a step's prompts;
the denominators of the loss count the whole step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from rekatrain.trainer.rloo.distributed import accumulating, backward
from rekatrain.trainer.rloo.logprobs import Reference
from rekatrain.trainer.rloo.loss import policy_loss, set_advantages
from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord, batch_records, idle_records
from rekatrain.trainer.rloo.microbatch import MicroBatch, count_denominators, equal_passes, make_microbatches
from rekatrain.trainer.rloo.rollouts import GroupSampler, InProcessRollouts, RolloutSource, count_informative
from rekatrain.trainer.rloo.setup import RunSetup


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a step works on. It is the same object in every step; only the weights change.

    model:     the policy as `CompletionLogprobs`, as Accelerate has prepared it
    reference: log-probabilities under the policy that the run began with; None where beta is 0
    rollouts:  samples and scores this process's groups of a step
    update:    clips the gradient, takes an optimizer step and clears the gradient
    """

    accelerator: Accelerator
    model: torch.nn.Module
    reference: Reference | None
    setup: RunSetup
    rollouts: RolloutSource
    update: Callable[[], None]

    @classmethod
    def in_process(
        cls,
        accelerator: Accelerator,
        model: torch.nn.Module,
        setup: RunSetup,
        sampler: GroupSampler,
        update: Callable[[], None],
        reference: Reference | None = None,
    ) -> "Run":
        """A run whose training processes sample, each its own prompts."""
        own = InProcessRollouts(accelerator, model, sampler, setup, setup.prompt_indices(accelerator))
        return cls(accelerator=accelerator, model=model, reference=reference, setup=setup, rollouts=own, update=update)


def take_step(run: Run, step: int, clock: Clock) -> list[RolloutRecord]:
    """Take step `step` (from 0) -> one record for each completion of this process."""
    config, accelerator = run.setup.config, run.accelerator

    # 1. Choose prompts. 2. Sample a group of completions for each. 3. Score them: all in rollouts.py, because scoring
    # begins as soon as a completion has ended, and dynamic sampling chooses again by the scores.
    groups, replaced = run.rollouts(step, clock.lap)
    denominators = count_denominators(accelerator, groups)
    if not denominators.num_completions or (run.reference is None and not count_informative(accelerator, groups)):
        # The gradient is 0: without an update, as AdamW's momentum would move the weights.
        return idle_records(step + 1, [*replaced, *groups])

    # 4. Pack the groups into micro-batches, about as much on each process. Without a KL, a group of equal rewards has
    # advantages of 0 and moves no weight: it is left out.
    idle = [] if run.reference else [group for group in groups if group.is_idle]
    trained = [group for group in groups if group not in idle]
    cost = accelerator.unwrap_model(run.model).pass_cost
    batches = make_microbatches(accelerator, trained, config.micro_batch_tokens, cost)

    # 5. Log-probabilities of the reference, and the advantages that do not wait for the training pass.
    batches = score_before_training(run, batches)

    for _ in range(config.num_iterations):
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with accumulating(accelerator, run.model, is_last=is_last):
                # 6. Loss and gradient. The first pass over a batch serves twice: its detached log-probabilities are the
                # sampling policy's, for the KL and the advantages; with gradient they make the loss.
                logprobs_T = run.model(batch.packed)
                if batch.old_logprobs is None:
                    batch.old_logprobs = logprobs_T.detach()
                if batch.advantages is None:
                    set_advantages([batch], config)
                loss, batch.clip_ratio = policy_loss(batch, logprobs_T, config, denominators)
                # Data parallelism averages gradients over processes, but the denominators have counted them all.
                backward(accelerator, run.model, loss * accelerator.num_processes, is_last=is_last)
        # 7. Update the weights.
        run.update()
    clock.lap("train")

    # 8. Record each completion.
    records = [record for batch in batches for record in batch_records(step + 1, batch, config)]
    return [*idle_records(step + 1, [*replaced, *idle]), *records]


def score_before_training(run: Run, batches: list[MicroBatch]) -> list[MicroBatch]:
    """Set reference log-probabilities, and advantages where they can or must be known before the training pass.

    Without a KL in the reward, advantages follow from the rewards alone. With it they also need the log-probabilities
    of every completion of their group. A micro-batch that holds its groups whole gets those from its own training pass;
    one with a part of a group needs a separate pass first. Returns the batches, filled up so that all processes make
    the same passes (`equal_passes`).
    """
    kl_in_reward = run.reference is not None and run.setup.config.kl_placement == "reward"
    early = [batch for batch in batches if batch.is_split or not kl_in_reward]
    if kl_in_reward:
        with torch.no_grad():
            for batch in equal_passes(run.accelerator, early):
                batch.old_logprobs = run.model(batch.packed)
    batches = equal_passes(run.accelerator, batches)
    if run.reference is not None:
        for batch in batches:
            batch.reference_logprobs = run.reference(batch.packed)
    if early:
        set_advantages(early, run.setup.config)
    return batches
