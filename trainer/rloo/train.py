"""The RLOO stage: set a run up, then take its steps. One step is in step.py, the objective in loss.py.

rekatrain train recipes/smollm2/rloo.yaml
accelerate launch --num_processes 8 -m rekatrain train recipes/reka-flash-3/rloo-8k.yaml
"""

import logging
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer

from rekatrain.trainer.models import optimizers
from rekatrain.trainer.models.continued import is_adapter
from rekatrain.trainer.models.load import Policy, check_trainable, load_policy
from rekatrain.trainer.models.loraplus import lr_ratio, split_groups
from rekatrain.trainer.models.probe import choose_texts
from rekatrain.trainer.processes.agreement import agree_on_start
from rekatrain.trainer.processes.interruption import INTERRUPTION, Abandoned, describe_end
from rekatrain.trainer.processes.launch import announce, read_launch
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.resume.fingerprints import take_fingerprints
from rekatrain.trainer.resume.origin import check_origin
from rekatrain.trainer.rloo.checkpoint import Checkpointer, Stateful, check_layout, load_weights
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import (
    GradientClipper,
    check_zero,
    make_accelerator,
    set_determinism,
    update_weights,
    zero_stage,
)
from rekatrain.trainer.rloo.evaluation import HEADLINE as EVALUATED
from rekatrain.trainer.rloo.evaluation import Evaluation
from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.kernels.fused_head import check_head
from rekatrain.trainer.rloo.kernels.grouped_attention import NAME as GROUPED_ATTENTION
from rekatrain.trainer.rloo.kernels.grouped_attention import decoder_and_head
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, make_reference
from rekatrain.trainer.rloo.metrics import HEADLINE, Clock, RolloutRecord, step_metrics
from rekatrain.trainer.rloo.sampler.vllm.checks import check_servers
from rekatrain.trainer.rloo.sampler.vllm.server_rollouts import ServerRollouts
from rekatrain.trainer.rloo.sampler.vllm.sleep import check_awake
from rekatrain.trainer.rloo.sequence_parallel import connect_sequence_group
from rekatrain.trainer.rloo.setup import RunSetup, prepare
from rekatrain.trainer.rloo.step import Run, take_step
from rekatrain.trainer.run.checkpoints import checkpoint_step
from rekatrain.trainer.run.folder import ROLLOUTS_FILE, RunFolder
from rekatrain.trainer.run.guards import NonFiniteGuard, StopGuard, UnscorableGuard, check_finite_weights
from rekatrain.trainer.run.log import RunLog
from rekatrain.trainer.run.schedule import follow_new_length, make_schedule

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool) -> None:
    """Run the stage to `max_steps`, from the newest checkpoint where `resume` is set and there is one."""
    with RunFolder(recipe.output_dir) as folder:
        # Check everything that can be wrong before a weight is loaded.
        folder.check(recipe, resume=resume)
        setup = prepare(recipe)
        with setup.grader, setup.closing:  # however the run ends, its workers and rollouts end
            _train(recipe, setup, folder, resume=resume)


def _train(recipe: Recipe, setup: RunSetup, folder: RunFolder, *, resume: bool) -> None:
    # Check the launch and the checkpoint, too.
    config = setup.config
    ddp_timeout = setup.ddp_timeout(read_launch().num_processes)
    accelerator = make_accelerator(bf16=config.bf16, ddp_timeout=ddp_timeout)
    connect_sequence_group(accelerator, ddp_timeout=ddp_timeout)
    checkpoint = folder.choose_checkpoint(resume=resume)
    keeps_optimizer = check_start(recipe, setup, accelerator, checkpoint)
    prints = take_fingerprints(recipe, setup.trained_rows())
    agree_on_start(prints, checkpoint)
    folder.open(recipe, checkpoint, resume=resume, origin=partial(check_origin, recipe, prints))
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    best = setup.best_model()
    best.restore(checkpoint)
    if checkpoint and (first_step == config.max_steps or best.is_exhausted):
        if accelerator.is_main_process:
            folder.start(recipe, first_step)  # deletes what a kill after the last step has left
        logger.info("%s is finished: %s is its last checkpoint", recipe.output_dir, checkpoint.name)
        return
    setup.grader.warm_up()  # loads the weights of reward models

    # Load the policy and the reference. An adapter starts from the same random weights on every process.
    set_determinism(recipe.seed, is_full=config.full_determinism)
    policy = load_prepared_policy(recipe, config, accelerator)
    model = CompletionLogprobs(
        policy,
        temperature=config.temperature,
        num_tokens=len(setup.tokenizer),
        fused_lm_head=config.fused_lm_head,
    ).train()
    # Before a checkpoint is restored: the reference is the policy that the run began with.
    reference = make_reference(
        accelerator, model, config, lambda: load_policy(recipe), continues_adapter=is_adapter(recipe)
    )
    if checkpoint and not keeps_optimizer:  # before an optimizer makes its own copies of the weights
        load_weights(accelerator, policy, checkpoint)

    # Prepare optimizer and schedule, and find who samples.
    optimizer, scheduler = make_optimizer(model, config, lr_ratio(recipe.lora))
    prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    announce(accelerator, policy)
    usual_prompt = int(median(len(prompt.ids) for prompt in setup.prompts))
    packing = model.pass_cost.describe(usual_prompt, config.num_generations, config.max_completion_length)
    logger.info("training: %s", packing)
    clipper = GradientClipper(config)
    update = partial(update_weights, accelerator, prepared, optimizer, clipper)
    run = Run.in_process(accelerator, prepared, setup, setup.make_sampler(policy), update, reference)
    servers = None
    states: dict[str, Stateful] = {"gradient_clipper": clipper}
    if config.vllm_server_urls:
        servers = ServerRollouts(accelerator, policy, setup, folder.path)
        setup.closing.callback(servers.close)
        run = replace(run, rollouts=servers)
        states["server_rollouts"] = servers

    # Restore the checkpoint.
    texts = choose_texts(setup.tokenizer, [prompt.ids for prompt in setup.prompts])
    checkpointer = Checkpointer(accelerator, policy, setup.tokenizer, folder, states, texts, best)
    if checkpoint and keeps_optimizer:
        checkpointer.restore(checkpoint)
        follow_new_length(scheduler, config.max_steps)
    else:
        for _ in range(first_step):
            scheduler.step()
    log = None
    if accelerator.is_main_process:
        folder.start(recipe, first_step)
        log = RunLog(folder, recipe, first_step=first_step, max_steps=config.max_steps)

    INTERRUPTION.begin_steps(accelerator)
    last_saved, is_interrupted = first_step, False
    guard = NonFiniteGuard(recipe, folder)
    check_scorable, check_bounds = UnscorableGuard(config.max_unscorable_steps), StopGuard(recipe)

    evaluation = Evaluation(accelerator, prepared, policy, setup, servers)

    def evaluate(step: int) -> dict[str, float | None]:
        measured = evaluation(step)
        if log is not None and measured:
            log.step(step, measured, headline=EVALUATED)
        return measured

    def save(step: int) -> None:
        check_finite_weights(prepared, step)
        with INTERRUPTION.time.timed("save"):
            checkpointer.save(step, config.save_total_limit)

    if first_step == 0 and evaluation.is_due(0):
        evaluate(0)
    for step in range(first_step, config.max_steps):
        clock = Clock()
        INTERRUPTION.check_time()
        try:
            with INTERRUPTION.time.timed("step"):
                local_records = take_step(run, step, clock)
        except Abandoned:
            is_interrupted = True
            break
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()

        # In the order of the prompts, whichever process has trained a group.
        records: list[RolloutRecord] = sorted(gather_object(local_records), key=itemgetter("prompt_index"))
        if clipper.num_nonfinite:
            clipper.num_nonfinite = 0
            guard.handle(step + 1, records, is_main_process=accelerator.is_main_process)
        check_scorable(step + 1, records)
        metrics = {**step_metrics(records), **clipper.metrics()}
        if log is not None:
            num_tokens = sum(len(record["completion_ids"]) for record in records)
            own = {"learning_rate": learning_rate, **clock.metrics(num_tokens)}
            own |= servers.metrics() if servers else {}
            folder.append(ROLLOUTS_FILE, records)
            if config.log_completions_steps and (step + 1) % config.log_completions_steps == 0:
                log.completions(step + 1, records)
            log.step(step + 1, {**metrics, **own, **setup.grader.metrics()}, headline=HEADLINE)
        check_bounds(step + 1, metrics)
        is_best = evaluation.is_due(step + 1) and best.update(step + 1, evaluate(step + 1))
        is_last = step + 1 == config.max_steps or best.is_exhausted
        if (step + 1) % config.save_steps == 0 or is_best or is_last:
            save(step + 1)
            last_saved = step + 1
        if is_last:
            break
    if is_interrupted and step > last_saved:
        save(step)
    if log is not None:
        log.close()
    accelerator.end_training()
    if is_interrupted:
        raise INTERRUPTION.end(describe_end(step))


def check_start(recipe: Recipe, setup: RunSetup, accelerator: Accelerator, checkpoint: Path | None) -> bool:
    """Raise InputError for a launch, servers or a checkpoint that do not fit -> True where the optimizer can go on."""
    config = setup.config
    check_trainable(recipe, is_deepspeed=zero_stage(accelerator) > 0, bf16=config.bf16)
    check_zero(recipe, zero_stage(accelerator))
    config.prompts_per_process(accelerator.num_processes)
    keeps_optimizer = checkpoint is None or check_layout(
        accelerator, checkpoint, restarts_optimizer=config.restart_optimizer
    )
    if config.vllm_enable_sleep_mode:
        check_awake(config)
    check_servers(recipe, config, setup.tokenizer, max(len(prompt.ids) for prompt in setup.prompts))
    return keeps_optimizer


def load_prepared_policy(recipe: Recipe, config: RLOOConfig, accelerator: Accelerator) -> Policy:
    """Load the policy, with grouped attention and, where the recipe sets it, activation checkpointing."""
    policy = load_policy(recipe)
    policy.to(accelerator.device)
    decoder, _ = decoder_and_head(policy)
    decoder.set_attn_implementation(GROUPED_ATTENTION)
    if config.cast_lm_head_to_fp32:
        compute_head_in_float32(policy)
    if config.fused_lm_head:
        check_head(policy)
    if config.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    return policy


def make_optimizer(
    model: torch.nn.Module, config: RLOOConfig, loraplus_lr_ratio: float | None = None
) -> tuple[Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Make the recipe's optimizer over the trained parameters, and its learning-rate schedule."""
    optimizer = optimizers.make_optimizer(
        config.optim,
        model,
        [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    if loraplus_lr_ratio is not None:
        split_groups(optimizer, model.named_parameters(), loraplus_lr_ratio)
    scheduler = make_schedule(
        config.lr_scheduler_type, optimizer, warmup_steps=config.warmup_steps, max_steps=config.max_steps
    )
    return optimizer, scheduler
