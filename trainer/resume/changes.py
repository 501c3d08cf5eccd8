"""The keys of a recipe that may change between a checkpoint and the run that continues it: one table, `RULES`.

free     changes nothing that is learned: what somebody changes after running out of memory
warned   changes the last bits of the arithmetic: one line, and the run goes on
refused  changes what is learned, or belongs to the state of the checkpoint: one line, and the run ends
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.defaults import ABSENT, values_with_defaults
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import ADAMW_8BIT, TORCH_ADAMW

logger = logging.getLogger(__name__)

# Of a value in a message.
MAX_CHARACTERS = 80
EXPORT = "rekatrain export RUN OUT"


class Effect(Enum):
    """The class of a key."""

    FREE = "free"
    WARNED = "warned"
    REFUSED = "refused"


@dataclass(frozen=True)
class Rule:
    """The class of some keys of some sections, with shell patterns; `-` stands for the keys outside sections.

    among: the values between which a key changes, for a rule about those alone; empty: all
    """

    effect: Effect
    sections: str
    keys: str
    reason: str
    among: tuple[str, ...] = ()

    def matches(self, key: str, *values: object) -> bool:
        """Return True if a dotted key is one of these, and the values before and now are, too."""
        if self.among and not (values and all(value in self.among for value in values)):
            return False
        prefixes = ["" if section == "-" else f"{section}." for section in self.sections.split()]
        return any(fnmatchcase(key, prefix + pattern) for prefix in prefixes for pattern in self.keys.split())


FREE, WARNED, REFUSED = Effect.FREE, Effect.WARNED, Effect.REFUSED
_TRL, _ALL = "sft reward", "sft reward rloo"
_LENGTH = "the schedule becomes that of the new length"
_RECORDS = "records and measurements"
_ENDS = "it decides when a run stops"
_MEMORY = "it decides how much is computed at a time"
_ROWS = "as long as the rows stay"
_WEIGHTS = "as long as the weights stay"
_BITS = "it changes the last bits of the arithmetic"
_STEPS = "it changes the size of the steps"
_LOSS = "it changes the loss"

# The first rule that matches a key decides.
RULES = (
    Rule(FREE, "-", "output_dir", "a run folder may be moved"),
    Rule(
        FREE,
        "-",
        "eval_dataset eval_dataset.* evaluate.* wandb wandb.* tensorboard tensorboard.* trackio trackio.*",
        _RECORDS,
    ),
    Rule(FREE, "-", "generate generate.* filter filter.* launch launch.*", "other commands read it"),
    Rule(FREE, "-", "on_nonfinite max_nonfinite_skips stop_if.* time_limit", _ENDS),
    Rule(FREE, _ALL, "max_steps", _LENGTH),
    Rule(FREE, _TRL, "num_train_epochs", _LENGTH),
    Rule(FREE, _ALL, "save_*", _RECORDS),
    Rule(FREE, _TRL, "logging_* per_device_eval_batch_size", _RECORDS),
    Rule(FREE, _ALL, "eval_*", _RECORDS),
    Rule(FREE, "rloo", "log_completions_steps", _RECORDS),
    Rule(FREE, _ALL, "metric_for_best_model greater_is_better early_stopping_patience", _ENDS),
    Rule(
        FREE,
        _TRL,
        "per_device_train_batch_size gradient_accumulation_steps",
        "as long as their product with the number of processes stays",
    ),
    Rule(FREE, _ALL, "gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps", _MEMORY),
    Rule(FREE, "rloo", "micro_batch_tokens per_device_generation_batch_size", _MEMORY),
    Rule(FREE, _TRL, "dataloader_num_workers dataloader_pin_memory", "workers"),
    Rule(FREE, _ALL, "ddp_timeout", "a time limit"),
    Rule(FREE, "rloo", "vllm_*", "servers"),
    Rule(FREE, "rloo", "max_unscorable_steps", _ENDS),
    Rule(FREE, "rloo", "restart_optimizer", "it is read when a run is resumed"),
    Rule(FREE, "-", "scoring.* rewards.*.timeout", "workers and time limits"),
    Rule(
        FREE,
        "rewards.code_tests rewards.reasoning_gym",
        "time_limit total_time_limit memory_limit_mb max_processes isolation",
        "limits of a sandbox",
    ),
    Rule(
        FREE,
        "rewards.judge rewards.remote_reward_model",
        "url base_url api_key_env concurrency request_timeout max_retries outage_timeout batch_size cache prompt_price "
        "completion_price",
        "servers",
    ),
    Rule(REFUSED, "dataset", "order", "a step would have other rows"),
    Rule(REFUSED, "dataset", "rewards", "other rewards would judge a row"),
    Rule(FREE, "-", "dataset dataset.* chat.*", _ROWS),
    Rule(FREE, "model rewards.reward_model", "pretrained_model_name_or_path revision", _WEIGHTS),
    Rule(FREE, "rewards.json_schema", "schema", "as long as the schema stays"),
    Rule(WARNED, "model", "attn_implementation", _BITS),
    Rule(WARNED, _ALL, "optim", _BITS, among=TORCH_ADAMW),
    Rule(FREE, _ALL, "optim", "two names of one optimizer", among=ADAMW_8BIT),
    Rule(REFUSED, _ALL, "optim", "the checkpoint holds the state of the earlier optimizer"),
    Rule(WARNED, _TRL, "pad_to_multiple_of", _BITS),
    Rule(WARNED, _ALL, "full_determinism", _BITS),
    Rule(WARNED, "rloo", "fused_lm_head", _BITS),
    Rule(WARNED, "rewards.reward_model", "device micro_batch_tokens", _BITS),
    Rule(REFUSED, "-", "stage", "it is another kind of run"),
    Rule(REFUSED, "-", "seed", "every random choice follows from it"),
    Rule(REFUSED, "model", "dtype quantization_config", "the weights would have other values"),
    Rule(REFUSED, "-", "lora lora.*", "the adapter of the checkpoint has the earlier form"),
    Rule(REFUSED, "-", "rewards.*", "it changes the reward of a completion"),
    Rule(REFUSED, _ALL, "bf16 tf32 cast_lm_head_to_fp32 rollout_dtype", "it changes the precision of the arithmetic"),
    Rule(REFUSED, _ALL, "learning_rate lr_scheduler_* warmup_steps weight_decay adam_* max_grad_norm", _STEPS),
    Rule(REFUSED, "rloo", "grad_norm_quantile grad_norm_window", _STEPS),
    Rule(REFUSED, _TRL, "max_length packing packing_strategy train_sampling_strategy", "a step would have other rows"),
    Rule(REFUSED, _TRL, "neftune_noise_alpha center_rewards_coefficient disable_dropout", _LOSS),
    Rule(
        REFUSED,
        "rloo",
        "prompts_per_step num_generations max_completion_length temperature top_p top_k reasoning_budget "
        "max_staleness dynamic_sampling_rounds",
        "a step would have other completions",
    ),
    Rule(
        REFUSED,
        "rloo",
        "beta num_iterations importance_sampling_* epsilon loss_type kl_placement truncated_completions "
        "truncation_penalty overlong_* advantage_scaling",
        _LOSS,
    ),
)
# A key that a rule forgets must stay; a test finds it.
UNKNOWN = Rule(REFUSED, "", "", "no rule allows it to change")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key with different values in two recipes; ABSENT for a section or a reward that only one of them has."""

    key: str
    before: Any  # a YAML value
    now: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.key} was {_shorten(self.before)} and is {_shorten(self.now)}"


def rule_of(key: str, *values: object) -> Rule:
    """Return the rule that decides about a dotted key with these values before and now; without them, about others."""
    return next((rule for rule in RULES if rule.matches(key, *values)), UNKNOWN)


def find_changes(before: Recipe, now: Recipe) -> list[Change]:
    """Return the keys that differ between two recipes, in the order of the recipe's sections.

    >>> [str(change) for change in find_changes(earlier, recipe)]
    ['rloo.micro_batch_tokens was 8192 and is 4096']
    """
    old, new = values_with_defaults(before, now)
    return [
        Change(key=key, before=was, now=value, rule=rule_of(key, was, value))
        for key in dict.fromkeys([*old, *new])
        if (was := old.get(key, ABSENT)) != (value := new.get(key, ABSENT))
    ]


def check_changes(changes: Sequence[Change]) -> None:
    """Raise InputError, with a reason, for each change of a key that must stay."""
    refused = [f"{change}: {change.rule.reason}" for change in changes if change.rule.effect is Effect.REFUSED]
    if refused:
        raise InputError(
            f"--resume: {'; '.join(refused)}. Set it back, or start another run, from the weights of this one: {EXPORT}"
        )


def report_changes(changes: Sequence[Change]) -> None:
    """Log the changes that may be made: one warning for those that change last bits, one line for the others."""
    warned = [f"{change} ({change.rule.reason})" for change in changes if change.rule.effect is Effect.WARNED]
    free = [str(change) for change in changes if change.rule.effect is Effect.FREE]
    if warned:
        logger.warning("changed since the checkpoint: %s", "; ".join(warned))
    if free:
        logger.info("changed since the checkpoint: %s", "; ".join(free))


def _shorten(value: Any) -> str:  # a YAML value, or ABSENT
    text = str(value) if value is ABSENT else repr(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."
