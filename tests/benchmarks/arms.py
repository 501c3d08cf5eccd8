"""One arm of a comparison of RLOO engines, run alone in its process:  python tests/benchmarks/arms.py ARM JSON OUT

ARM is a key of OWN_SETTINGS or of TRL_SETTINGS. JSON holds the fields of `Work`, which all arms have in common. The
measurements are written to OUT. Both arms train all weights of the same model in float32 with torch's fused AdamW on
the same prompts in the same order.
"""

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import NEVER, load_folder_tokenizer, load_model, load_prompts, memory_mb
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from work import Meter, Work, by_ids

from rekatrain.rewards.compose import RewardFunction
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.rollouts import step_prompts
from rekatrain.trainer.rloo.setup import RunSetup, prepare

# Options of this project's engine.
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "rekatrain": {},
    "rekatrain-bf16-rollouts": {
        "rollout_dtype": "bfloat16",
        "importance_sampling_level": "token",
        "importance_sampling_correction": "token_truncate",
    },
}
# `trl_arm` holds the settings that the comparison fixes (lengths, k, learning rate, precision, ...). `trl-defaults` are
# TRL's defaults; the others are its options on a CPU. A batch size is completions per pass; None: all of a step.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "trl-defaults": {"per_device_train_batch_size": 8},
    "trl-8": {"per_device_train_batch_size": 8, "gradient_checkpointing": False},
    "trl-16": {"per_device_train_batch_size": 16, "gradient_checkpointing": False},
    "trl-all": {"per_device_train_batch_size": None, "gradient_checkpointing": False},
    "trl-8-continuous": {
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": False,
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 256, "max_batch_tokens": 2048},
    },
}


def make_task(work: Work, options: dict[str, Any]) -> RunSetup:
    """Make the prompts, rewards and settings of the arms."""
    settings = {
        "max_steps": work.steps,
        "prompts_per_step": work.prompts_per_step,
        "num_generations": work.num_generations,
        "max_completion_length": work.max_completion_length,
        "beta": work.beta,
        "learning_rate": work.learning_rate,
        "per_device_generation_batch_size": work.prompts_per_step * work.num_generations,
        "micro_batch_tokens": work.micro_batch_tokens,
        **options,
    }
    if work.recipe:
        overrides = [f"rloo.{name}={value}" for name, value in settings.items()]
        return prepare(load_recipe(work.recipe, [f"model.pretrained_model_name_or_path={work.model}", *overrides]))
    tokenizer = load_folder_tokenizer(work.model, never_ends=work.equal_lengths)
    prompts = load_prompts(tokenizer, work.prompts, work.steps * work.prompts_per_step)
    rewards = [RewardFunction(name="by_ids", weight=1.0, function=by_ids, columns=())]
    return RunSetup(config=RLOOConfig(**settings), tokenizer=tokenizer, prompts=prompts, rewards=rewards)


def rekatrain_arm(work: Work, task: RunSetup, model: PreTrainedModel, meter: Meter) -> dict[str, Any]:
    """Run the steps of this project's engine."""
    from accelerate import Accelerator

    from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, PackedCompletions, make_reference
    from rekatrain.trainer.rloo.metrics import Clock
    from rekatrain.trainer.rloo.step import Run, take_step

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    logprobs = CompletionLogprobs(model, temperature=1.0, num_tokens=len(task.tokenizer)).train()
    reference = make_reference(accelerator, logprobs, task.config)
    meter.watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.learning_rate, weight_decay=0.0, fused=True)
    sampler = task.make_sampler(model)
    sample = sampler.sample

    def timed_sample(*arguments: Any) -> Any:
        with meter.phase("sample"):
            return sample(*arguments)

    def timed_reference(packed: PackedCompletions) -> torch.Tensor:
        assert reference is not None
        with meter.phase("score"):
            # Its modules are copies made before the hooks: they run on what is packed.
            meter.slots["score"] += packed.input_ids.numel()
            return reference(packed)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    sampler.sample = timed_sample  # type: ignore[method-assign]  # of this instance
    run = Run.in_process(
        accelerator,
        logprobs,
        replace(task, seed=work.seed),
        sampler,
        update,
        timed_reference if reference else None,
    )
    meter.begin()
    for step in range(work.steps):
        clock = Clock()
        records = take_step(run, step, clock)
        meter.seconds["reward"] = clock.metrics(1)["time/reward"]
        prompt_lengths = {prompt.text: len(prompt.ids) for prompt in task.prompts}
        in_order_of_prompts = sorted(records, key=lambda record: record["prompt_index"])
        meter.sampled += [
            (prompt_lengths[record["prompt"]], len(record["completion_ids"])) for record in in_order_of_prompts
        ]
        meter.rewards += [record["reward"] for record in records]
        meter.end_step(work.num_generations, 2 if work.beta else 1)
    return asdict(task.config)


def trl_arm(work: Work, task: RunSetup, model: PreTrainedModel, meter: Meter, settings: dict[str, Any]) -> Any:
    """Run the steps of TRL's RLOOTrainer."""
    from datasets import Dataset
    from trl import RLOOConfig as TRLConfig
    from trl import RLOOTrainer

    class Timed(RLOOTrainer):
        def _generate(self, prompts: list) -> Any:
            with meter.phase("sample"):
                prompt_ids, completion_ids, *others = super()._generate(prompts)
            meter.sampled += zip(map(len, prompt_ids), map(len, completion_ids), strict=True)
            return prompt_ids, completion_ids, *others

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with meter.phase("score"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def _calculate_rewards(self, *args: Any) -> Any:
            with meter.phase("reward"):
                rewards = super()._calculate_rewards(*args)
            meter.rewards += (rewards * self.reward_weights).nansum(dim=1).tolist()
            return rewards

    class Ends(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.end_step(work.num_generations, 2 if work.beta else 1)

    num_completions = work.prompts_per_step * work.num_generations
    at_once = min(settings["per_device_train_batch_size"] or num_completions, num_completions)
    with TemporaryDirectory() as folder:
        config = TRLConfig(
            output_dir=folder,
            **settings | {"per_device_train_batch_size": at_once},
            gradient_accumulation_steps=num_completions // at_once,
            num_generations=work.num_generations,
            max_completion_length=work.max_completion_length,
            max_steps=work.steps,
            beta=work.beta,
            learning_rate=work.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            reward_weights=[reward.weight for reward in task.rewards],
            seed=work.seed,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_steps=work.steps,
            disable_tqdm=True,
        )
        trainer = Timed(
            model=model,
            reward_funcs=[reward.function for reward in task.rewards],
            args=config,
            train_dataset=Dataset.from_list(
                [{"prompt": prompt.text, **prompt.row.columns} for prompt in in_order(task.prompts, work)]
            ),
            processing_class=with_padding(task.tokenizer),
            callbacks=[Ends()],
        )
        meter.watch(trainer.model)
        if trainer.ref_model is not None:
            meter.watch(trainer.ref_model)
        trainer.train()
    names = [*settings, "gradient_accumulation_steps", "gradient_checkpointing", "optim", "generation_batch_size"]
    return {name: str(getattr(config, name)) for name in dict.fromkeys(names)}


def in_order(prompts: Sequence[Prompt], work: Work) -> list[Prompt]:
    """Return the prompts of this project's engine, in the order of its steps."""
    arguments = {"seed": work.seed, "prompts_per_step": work.prompts_per_step}
    return [prompts[i] for step in range(work.steps) for i in step_prompts(len(prompts), step=step, **arguments)]


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer the pad token that TRL needs; the model may have no embedding for the eos token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def main() -> None:
    """Run one arm and write its measurements."""
    arm, work_json, out = sys.argv[1:]
    work = Work(**json.loads(work_json))
    task = make_task(work, OWN_SETTINGS.get(arm, {}))
    set_seed(work.seed)
    on_gpu = torch.cuda.is_available()
    model = load_model(work.model, "cuda" if on_gpu else "cpu", work.dtype)
    if work.equal_lengths:
        model.generation_config.eos_token_id = task.tokenizer.convert_tokens_to_ids(NEVER)
    gc.collect()
    loaded = torch.cuda.memory_allocated() / 2**20 if on_gpu else memory_mb("VmRSS")
    meter = Meter()
    if arm in OWN_SETTINGS:
        settings = rekatrain_arm(work, task, model, meter)
    else:
        settings = trl_arm(work, task, model, meter, TRL_SETTINGS[arm])
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory_mb("VmHWM")
    result = {"loaded_mb": loaded, "peak_mb": peak, "steps": meter.steps, "arm_settings": settings}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
