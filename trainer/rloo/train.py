"""The RLOO stage: prompts -> rollouts -> rewards -> advantages -> loss -> step -> log -> checkpoint.

    rekatrain train recipes/smollm2/rloo.yaml
    accelerate launch --num_processes 8 -m rekatrain train recipes/reka-flash-3/rloo-lora.yaml

`train` sets the run up and goes through its steps; `take_step` is one step, read from top to bottom; the formulas are
in objective.py. Each process samples and trains its share of a step's prompts; denominators are the whole step's.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rekatrain.trainer.launch import announce
from rekatrain.trainer.models import check_trainable, load_policy
from rekatrain.trainer.prompts import step_prompts
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.checkpoint import Checkpointer, check_layout, load_weights
from rekatrain.trainer.rloo.clipping import GradientClipper
from rekatrain.trainer.rloo.distributed import (
    accumulating,
    backward,
    check_dtype,
    make_accelerator,
    update_weights,
    whole_weights,
    zero_stage,
)
from rekatrain.trainer.rloo.kernels.grouped_attention import NAME as GROUPED_ATTENTION
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, decoder_and_head
from rekatrain.trainer.rloo.metrics import HEADLINE, Clock, RolloutRecord, batch_records, idle_records, step_metrics
from rekatrain.trainer.rloo.microbatch import (
    LossDenominators,
    batch_loss,
    equal_passes,
    make_microbatches,
    set_advantages,
)
from rekatrain.trainer.rloo.reference import Reference, make_reference
from rekatrain.trainer.rloo.rollouts import Group, GroupSampler, sample_groups, score_groups
from rekatrain.trainer.rloo.sampler.vllm.checks import check_servers
from rekatrain.trainer.rloo.sampler.vllm.rollouts import ServerRollouts
from rekatrain.trainer.rloo.setup import RunSetup, prepare
from rekatrain.trainer.run_folder import ROLLOUTS_FILE, RunFolder, checkpoint_step
from rekatrain.trainer.run_log import RunLog
from transformers import get_scheduler

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run the stage to `max_steps`, from the newest checkpoint where `resume` finds one."""
    run = RunFolder(recipe.output_dir)
    checkpoint = run.check(recipe, resume=resume)
    task = prepare(recipe)
    config = task.config
    accelerator = make_accelerator(bf16=config.bf16)
    check_trainable(recipe, is_deepspeed=zero_stage(accelerator) > 0, bf16=config.bf16)
    check_dtype(accelerator, recipe.model.get("dtype", "bfloat16"), bf16=config.bf16)
    config.prompts_per_process(accelerator.num_processes)
    keeps_optimizer = checkpoint is None or check_layout(
        accelerator, checkpoint, restarts_optimizer=config.restart_optimizer
    )
    check_servers(recipe, config, task.tokenizer, max(len(prompt.ids) for prompt in task.prompts))
    task.grader.warm_up()  # a reward model's weights are loaded here

    set_seed(recipe.seed)  # an adapter starts from the same random weights on every process
    policy = load_policy(recipe)
    policy.to(accelerator.device)
    decoder, _ = decoder_and_head(policy)
    decoder.set_attn_implementation(GROUPED_ATTENTION)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    model = CompletionLogprobs(policy, temperature=config.temperature, num_tokens=len(task.tokenizer)).train()
    # Before a checkpoint is restored: the reference is the policy that the run began with.
    reference = make_reference(accelerator, model, config, lambda: load_policy(recipe))
    if checkpoint and not keeps_optimizer:  # before an optimizer makes its own copies of the weights
        load_weights(accelerator, policy, checkpoint)
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
    announce(accelerator, policy)
    clipper = GradientClipper(config)
    accelerator.register_for_checkpointing(clipper)
    usual_prompt = int(median(len(prompt.ids) for prompt in task.prompts))
    rule = accelerator.unwrap_model(model).pass_cost.describe
    logger.info("training: %s", rule(usual_prompt, config.num_generations, config.max_completion_length))
    servers = ServerRollouts(accelerator, policy, task, run.path, roll_out) if config.vllm_server_urls else None
    sampler = servers.sampler if servers else task.make_sampler(policy)
    checkpointer = Checkpointer(accelerator, policy, task.tokenizer, run)
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    if checkpoint and keeps_optimizer:
        checkpointer.restore(checkpoint)
    else:
        for _ in range(first_step):
            scheduler.step()
    log = None
    if accelerator.is_main_process:
        run.start(recipe, first_step)
        log = RunLog(run, recipe, first_step=first_step, max_steps=config.max_steps)

    def update() -> None:
        clipper.remember(update_weights(accelerator, model, optimizer, clipper.limit))

    for step in range(first_step, config.max_steps):
        clock = Clock()
        local_records = take_step(
            accelerator,
            model,
            reference,
            sampler,
            task,
            update,
            seed=recipe.seed,
            step=step,
            clock=clock,
            rollouts=servers,
        )
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()

        records: list[RolloutRecord] = gather_object(local_records)
        if log is not None:
            num_tokens = sum(len(record["completion_ids"]) for record in records)
            own = {**clipper.metrics(), "learning_rate": learning_rate, **clock.metrics(num_tokens)}
            own |= servers.metrics() if servers else {}
            run.append(ROLLOUTS_FILE, records)
            log.step(step + 1, {**step_metrics(records), **own, **task.grader.metrics()}, headline=HEADLINE)
        if (step + 1) % config.save_steps == 0 or step + 1 == config.max_steps:
            checkpointer.save(step + 1, config.save_total_limit)
    if log is not None:
        log.close()
    task.grader.close()
    accelerator.end_training()


def take_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    reference: Reference | None,
    sampler: GroupSampler,
    task: RunSetup,
    update: Callable[[], None],
    *,
    seed: int,
    step: int,
    clock: Clock,
    rollouts: Callable[..., tuple[list[Group], list[Group]]] | None = None,
) -> list[RolloutRecord]:
    """Sample, score and train on this process's share of a step -> a record for each of its completions.

    `update` is called with each update's gradient on the model; `rollouts` stands in for `roll_out`. In the one update
    that is the default, the policy is run once on each completion: its detached log-probabilities give the KL and so
    the advantages, which weigh the same log-probabilities in the loss. All processes make the same passes.
    """
    config = task.config
    share = config.prompts_per_process(accelerator.num_processes)
    prompt_indices = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    # Servers have weights of their own; here the whole model is needed.
    with nullcontext() if rollouts else whole_weights(accelerator, model):
        groups, replaced = (rollouts or roll_out)(sampler, task, prompt_indices, seed=seed, step=step, clock=clock)
    totals = count_in_loss(accelerator, groups)

    # Without a KL, a group of equal rewards moves no weight. One group always stays, so that every process takes part
    # in the backward pass.
    idle = [] if reference else [group for group in groups[1:] if group.is_idle]
    trained = [group for group in groups if group not in idle]
    cost = accelerator.unwrap_model(model).pass_cost
    some_token = trained[0].prompt.ids[0]
    batches = list(make_microbatches(trained, config.micro_batch_tokens, cost, accelerator.device))
    # With the KL in the reward, advantages come with the pass over their group, and those of a group that no
    # micro-batch holds whole need a pass of their own before.
    kl_in_reward = reference is not None and config.kl_placement == "reward"
    in_advance = [batch for batch in batches if batch.is_split or not kl_in_reward]
    if kl_in_reward:
        with torch.no_grad():
            for batch in equal_passes(accelerator, in_advance, some_token):
                batch.old_logprobs = model(batch.rows)
    batches = equal_passes(accelerator, batches, some_token)
    if reference is not None:
        for batch in batches:
            batch.reference_logprobs = reference(batch.rows)
    set_advantages(in_advance, config)

    for _ in range(config.num_iterations):
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with accumulating(accelerator, model, is_last=is_last):
                logprobs_T = model(batch.rows)
                if batch.old_logprobs is None:
                    batch.old_logprobs = logprobs_T.detach()
                if not len(batch.advantages):
                    set_advantages([batch], config)
                loss = batch_loss(batch, logprobs_T, config, totals)
                # Data-parallel gradients are averaged over processes; the totals have counted them all already.
                backward(accelerator, model, loss * accelerator.num_processes, is_last=is_last)
        update()
    clock.lap("train")
    return [
        *idle_records(step + 1, [*replaced, *idle]),
        *(record for batch in batches for record in batch_records(step + 1, batch)),
    ]


def roll_out(
    sampler: GroupSampler, task: RunSetup, prompt_indices: Sequence[int], *, seed: int, step: int, clock: Clock
) -> tuple[list[Group], list[Group]]:
    """Sample and score a group for each prompt_index -> those to train on, and those that dynamic sampling replaced.

    Dynamic sampling (DAPO, arXiv 2503.14476) replaces a prompt whose rewards are all equal, at most
    `dynamic_sampling_rounds` times. A round adds `prompts_per_step` to the indices; prompts and draws follow from the
    index alone, so they depend neither on the other prompts nor on the processes.
    """
    config = task.config
    groups: dict[int, Group] = {}
    replaced = []
    for number in range(1 + config.dynamic_sampling_rounds):
        prompt_indices = [
            prompt_index
            for prompt_index in prompt_indices
            if prompt_index not in groups or groups[prompt_index].is_idle
        ]
        if not prompt_indices:
            break
        replaced += [groups[prompt_index] for prompt_index in prompt_indices if prompt_index in groups]
        chosen = step_prompts(
            len(task.prompts), seed=seed, step=step, prompts_per_step=config.prompts_per_step, round_number=number
        )
        prompts = [task.prompts[chosen[prompt_index]] for prompt_index in prompt_indices]
        numbered = [prompt_index + number * config.prompts_per_step for prompt_index in prompt_indices]
        sampled = sample_groups(
            sampler,
            task.grader,
            task.tokenizer,
            prompts,
            numbered,
            seed=seed,
            step=step,
            num_generations=config.num_generations,
        )
        clock.lap("sample")
        scored = score_groups(task.grader, task.tokenizer, sampled, config)
        groups.update(zip(prompt_indices, scored, strict=True))
        clock.lap("reward")
    return list(groups.values()), replaced


def count_in_loss(accelerator: Accelerator, groups: Sequence[Group]) -> LossDenominators:
    """Completions and trained tokens in the loss of a step, over all processes."""
    counted = [
        len(completion.ids) - len(completion.forced)
        for group in groups
        for completion, is_in_loss in zip(group.completions, group.is_in_loss, strict=True)
        if is_in_loss
    ]
    local = torch.tensor([len(counted), sum(counted)], device=accelerator.device)
    num_completions, num_tokens = accelerator.reduce(local, "sum").tolist()
    return LossDenominators(num_completions=num_completions, num_tokens=num_tokens)
