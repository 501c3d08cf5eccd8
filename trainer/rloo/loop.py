"""The RLOO stage: prompts -> rollouts -> rewards -> advantages -> loss -> step -> log -> checkpoint.

    rekatrain train recipes/smollm2/rloo.yaml
    accelerate launch --num_processes 8 -m trainer train recipes/reka-flash-3/rloo-lora.yaml

`train` sets the run up and goes through its steps; `take_step` is one step, read from top to bottom; the formulas are
in objective.py. Each process samples and trains its share of a step's prompts; denominators are the whole step's.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from torch import Tensor
from transformers import get_scheduler

from trainer.launch import make_accelerator
from trainer.models import check_trainable, load_policy
from trainer.prompts import step_prompts
from trainer.recipe import Recipe
from trainer.rloo.checkpoint import Checkpointer
from trainer.rloo.config import RLOOConfig
from trainer.rloo.logprobs import CompletionLogprobs, Rows, micro_batches
from trainer.rloo.metrics import HEADLINE, Clock, RolloutRecord, rollout_records, step_metrics
from trainer.rloo.objective import leave_one_out_advantages, policy_gradient_loss, regularised_rewards, sequence_sums
from trainer.rloo.rollouts import group_rows, sample_groups, score_groups
from trainer.rloo.sampler import Sampler
from trainer.rloo.task import RLOOTask, prepare
from trainer.run_folder import ROLLOUTS_FILE, RunFolder
from trainer.run_log import RunLog

Reference = Callable[[Rows], Tensor]


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run the stage to `max_steps`, from the newest checkpoint where `resume` finds one."""
    run = RunFolder(recipe.output_dir)
    checkpoint = run.check(recipe, resume=resume)
    task = prepare(recipe)
    config = task.config
    accelerator = make_accelerator(bf16=config.bf16)
    check_trainable(recipe, has_master_weights=False)
    config.prompts_per_process(accelerator.num_processes)

    set_seed(recipe.seed)  # an adapter starts from the same random weights on every process
    policy = load_policy(recipe)
    policy.to(accelerator.device)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    model = CompletionLogprobs(policy, temperature=config.temperature, num_tokens=len(task.tokenizer)).train()
    # Before a checkpoint is restored: the reference is the policy that the run began with.
    reference = make_reference(model, config)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    sampler = task.make_sampler(policy)
    checkpointer = Checkpointer(accelerator, policy, task.tokenizer, run)
    first_step = checkpointer.restore(checkpoint) if checkpoint else 0
    log = None
    if accelerator.is_main_process:
        run.start(recipe, first_step)
        log = RunLog(run, recipe, first_step=first_step, max_steps=config.max_steps)

    for step in range(first_step, config.max_steps):
        clock = Clock()
        local_records = take_step(
            accelerator, model, reference, sampler, task, seed=recipe.seed, step=step, clock=clock
        )
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        clock.lap("train")

        records: list[RolloutRecord] = gather_object(local_records)
        if log is not None:
            num_tokens = sum(len(record["completion_ids"]) for record in records)
            metrics = {"grad_norm": float(grad_norm), "learning_rate": learning_rate, **clock.metrics(num_tokens)}
            run.append(ROLLOUTS_FILE, records)
            log.step(step + 1, {**step_metrics(records), **metrics}, headline=HEADLINE)
        if (step + 1) % config.save_steps == 0 or step + 1 == config.max_steps:
            checkpointer.save(step + 1, config.save_total_limit)
    if log is not None:
        log.close()
    accelerator.end_training()


def take_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    reference: Reference | None,
    sampler: Sampler,
    task: RLOOTask,
    *,
    seed: int,
    step: int,
    clock: Clock,
) -> list[RolloutRecord]:
    """Sample, score and backpropagate this process's share of a step -> a record for each of its completions.

    The gradient is left on the model for the optimizer. The policy is run once on each completion: its detached
    log-probabilities give the KL and so the advantages, which weigh the same log-probabilities in the loss.
    """
    config = task.config
    chosen = step_prompts(len(task.prompts), seed=seed, step=step, prompts_per_step=config.prompts_per_step)
    share = config.prompts_per_process(accelerator.num_processes)
    slots = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    prompts = [task.prompts[chosen[slot]] for slot in slots]
    sampled = sample_groups(sampler, prompts, slots, seed=seed, step=step, num_generations=config.num_generations)
    clock.lap("sample")

    groups = score_groups(task.rewards, task.tokenizer, prompts, slots, sampled)
    num_scorable = sum(not math.isnan(reward) for group in groups for reward in group.rewards)
    num_scorable = int(accelerator.reduce(torch.tensor(num_scorable, device=accelerator.device), "sum"))
    clock.lap("reward")

    # Without a KL, a group of equal rewards moves no weight. One group always stays, so that every process takes part
    # in the backward pass.
    idle = [] if reference else [group for group in groups[1:] if group.is_idle]
    groups = [group for group in groups if group not in idle]
    records = rollout_records(step + 1, idle, torch.zeros(len(idle) * config.num_generations), None, None)
    batches = list(micro_batches([group.row_lengths for group in groups], config.micro_batch_tokens))
    for number, places in enumerate(batches, start=1):
        batch = [groups[place] for place in places]
        rows = group_rows(batch, accelerator.device)
        reference_T = reference(rows) if reference else None
        # Gradients travel between processes once a step, with the last micro-batch.
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            logprobs_T = model(rows)
            logprobs_N = sequence_sums(logprobs_T, rows.lengths)
            kl_N = None if reference_T is None else sequence_sums(logprobs_T.detach() - reference_T, rows.lengths)
            rewards_PG = torch.tensor([group.rewards for group in batch], device=accelerator.device)
            if kl_N is not None:
                rewards_PG = regularised_rewards(rewards_PG, kl_N.view_as(rewards_PG), config.beta)
            advantages_N = leave_one_out_advantages(rewards_PG).flatten()
            loss = policy_gradient_loss(logprobs_N, advantages_N, num_scorable)
            # Data-parallel gradients are averaged over processes; the denominator has counted them all already.
            accelerator.backward(loss * accelerator.num_processes)
        records += rollout_records(step + 1, batch, advantages_N, logprobs_N, kl_N)
    return records


def make_reference(model: CompletionLogprobs, config: RLOOConfig) -> Reference | None:
    """Log-probabilities under the policy that the run begins with; None where beta is 0 and nobody asks for them.

    With LoRA that policy is the model without its adapter and costs no memory; otherwise it is a copy of the live one.
    """
    if config.beta == 0:
        return None
    policy = model.policy
    frozen = model if isinstance(policy, PeftModel) else copy.deepcopy(model).eval().requires_grad_(False)

    def reference_logprobs(rows: Rows) -> Tensor:
        without_adapter = policy.disable_adapter() if isinstance(policy, PeftModel) else nullcontext()
        with torch.no_grad(), without_adapter:
            return frozen(rows)

    return reference_logprobs
