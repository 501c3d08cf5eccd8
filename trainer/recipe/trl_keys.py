"""The keys of TRL's and transformers' configs that a recipe may set, with their values, and why others are refused.

Every field of `trl.SFTConfig` and `trl.RewardConfig` is in exactly one table; a test walks them. What is allowed has
been run with this program. A key that a new version of TRL adds is unknown until somebody tries it and adds it here.
"""

from typing import Any, Literal

from rekatrain.data.ranges import (
    Count,
    CountOrZero,
    FractionBelowOne,
    Interval,
    IntervalOrZero,
    LearningRate,
    PositiveFraction,
    PositiveWeight,
    Seconds,
    Weight,
)
from rekatrain.trainer.recipe.optimizers import Optim

# Keywords that the program itself passes: the run folder, its seed, the form of the rows.
TRL_RESERVED = (
    "output_dir",
    "seed",
    "data_seed",
    "report_to",
    "use_cpu",
    "disable_tqdm",
    "dataset_kwargs",
    "model_init_kwargs",
    "deepspeed",  # the launch file decides how a run is sharded
    "fsdp",
)
# data/reward_model_input.py decides how text becomes ids.
REWARD_RESERVED = ("chat_template_path", "eos_token", "pad_token")

SCHEDULES = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]

# Any: type forms, which typing has no class for.
COMMON_ALLOWED: dict[str, Any] = {
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    "num_train_epochs": PositiveWeight,
    "max_steps": Literal[-1] | Count,  # -1: num_train_epochs decides
    "max_length": Count | None,
    "learning_rate": LearningRate,
    "lr_scheduler_type": SCHEDULES,
    "lr_scheduler_kwargs": dict[str, bool | int | float | str] | None,
    "warmup_steps": IntervalOrZero,
    "optim": Optim,
    "weight_decay": FractionBelowOne,
    "adam_beta1": FractionBelowOne,
    "adam_beta2": FractionBelowOne,
    "adam_epsilon": PositiveFraction,
    "max_grad_norm": Weight,  # 0: not clipped
    "bf16": bool,
    "full_determinism": bool,
    "tf32": bool | None,
    "gradient_checkpointing": bool,
    "gradient_checkpointing_kwargs": dict[Literal["use_reentrant"], bool] | None,
    "torch_empty_cache_steps": Count | None,
    "logging_strategy": Literal["steps", "epoch"],
    "logging_steps": Interval,
    "logging_first_step": bool,
    "eval_strategy": Literal["no", "steps", "epoch"],
    "eval_steps": Interval | None,
    "eval_on_start": bool,
    "eval_accumulation_steps": Count | None,
    "per_device_eval_batch_size": Count,
    "metric_for_best_model": str | None,
    "greater_is_better": bool | None,
    "early_stopping_patience": Count | None,  # of transformers' EarlyStoppingCallback
    "save_strategy": Literal["steps", "epoch"],
    "save_steps": Interval,
    "save_total_limit": Count | None,
    "save_only_model": bool,
    "dataloader_num_workers": CountOrZero,
    "dataloader_pin_memory": bool,
    "train_sampling_strategy": Literal["random", "sequential"],
    "ddp_timeout": Seconds,
    "pad_to_multiple_of": Count | None,
}
SFT_ALLOWED: dict[str, Any] = {
    **COMMON_ALLOWED,
    "packing": bool,
    "packing_strategy": Literal["bfd"],
    "neftune_noise_alpha": PositiveWeight | None,
}
REWARD_ALLOWED: dict[str, Any] = {
    **COMMON_ALLOWED,
    "center_rewards_coefficient": Weight | None,
    "disable_dropout": bool,
}

# Why a value of an allowed key is not among its values.
VALUE_REASONS: dict[str, dict[str, str]] = {
    "packing_strategy": {
        "wrapped": "it lays rows end to end as one text, so a row attends to the rows before it, and cuts rows in two",
        "bfd_split": "it cuts rows in two; no row is longer than max_length here, so bfd packs them all",
    },
    "save_strategy": {
        "no": "the run would leave nothing behind; set steps or epoch",
        "best": "a run resumes from checkpoints at known steps; set steps or epoch",
    },
    "lr_scheduler_type": {
        "reduce_lr_on_plateau": "a resumed run could not repeat its steps",
        "greedy": "a resumed run could not repeat its steps",
    },
    "train_sampling_strategy": {
        "group_by_length": "rows of one batch would be chosen by their length; sft.packing wastes no padding",
        "batch_rebalance": "it needs a column of lengths, which the encoded rows do not have",
    },
}

_ROWS = "rows are encoded, masked and checked before TRL sees them"
_LAUNCH = "the launch file decides it"
_TRACKING = "the sections wandb and output_dir decide where a run is recorded"
_PROGRAM = "the program needs its default"
_UNTESTED = "nobody has tried it with this program"
_EVALUATION = "the metrics of held-out rows are fixed"
# A key that is refused -> the reason.
COMMON_REFUSED: dict[str, str] = {
    **dict.fromkeys(("optim_args", "optim_target_modules"), "AdamW has the keys adam_beta1, adam_beta2, adam_epsilon"),
    "average_tokens_across_devices": "the loss of a step would depend on how rows fall to processes",
    "label_smoothing_factor": "the loss is that of the rows' labels alone",
    "fp16": "its gradients overflow; set bf16: true",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation computes as training does"),
    **dict.fromkeys(("activation_checkpointing",), "write gradient_checkpointing"),
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cache"), _UNTESTED),
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "it replaces layers of the model after the checks; TRL's own fused LM head always computes the loss",
    ),
    "auto_find_batch_size": "it would change the batch of a step in silence; set per_device_train_batch_size",
    **dict.fromkeys(("log_on_each_node", "log_level", "log_level_replica"), "the main process logs"),
    "logging_nan_inf_filter": "it logs a loss of NaN as an earlier one",
    "include_num_input_tokens_seen": "num_tokens is always logged",
    **dict.fromkeys(("run_name", "project"), _TRACKING),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKING),
    "eval_delay": _EVALUATION,
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _EVALUATION),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics"), _EVALUATION),
    "save_on_each_node": "checkpoints are written to output_dir, which all nodes see",
    "enable_jit_checkpoint": "signals save a checkpoint already",
    "load_best_model_at_end": "the best checkpoint is kept: rekatrain export RUN OUT --checkpoint best",
    "ignore_data_skip": "a resumed run would train on other rows than an unbroken one",
    "restore_callback_states_from_checkpoint": _PROGRAM,
    "resume_from_checkpoint": "give the command line --resume",
    **dict.fromkeys(("accelerator_config", "parallelism_config", "fsdp_config", "local_rank"), _LAUNCH),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _LAUNCH),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend"), _LAUNCH),
    "dataloader_drop_last": "it leaves rows out in silence",
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), _UNTESTED),
    **dict.fromkeys(("dataloader_multiprocessing_context", "dataloader_in_order"), _UNTESTED),
    **dict.fromkeys(("remove_unused_columns", "label_names", "length_column_name"), _ROWS),
    **dict.fromkeys(("debug", "skip_memory_metrics"), _UNTESTED),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command decides it"),
    "trust_remote_code": "code of a model is never run",
    "dataset_num_proc": _ROWS,
    "chat_template_path": "the chat format is Reka's, data/chat.py",
    "eos_token": "the model's config and its tokenizer name it; a run that changes one of them never stops",
    "pad_token": "padding is masked, so it needs no token",
    "activation_offloading": "the memory plan does not know it; set gradient_checkpointing",
}
SFT_REFUSED: dict[str, str] = {
    **COMMON_REFUSED,
    "assistant_only_loss": "the loss mask is made with the rows: assistant turns alone are trained (chat.turns)",
    "completion_only_loss": "the loss mask is made with the rows: prompts are never trained",
    "dataset_text_field": _ROWS,
    "truncation_mode": "rows are never cut; dataset.bad_rows: skip leaves out those above max_length",
    "shuffle_dataset": "the seed shuffles each epoch already; train_sampling_strategy: sequential keeps the order",
    "padding_free": "set packing: true, which wastes no padding either",
    "eval_packing": _EVALUATION,
    "loss_type": "the loss is the mean negative log-probability of the trained tokens",
    "router_aux_loss_coef": "models with a router have not been tried",
}
REWARD_REFUSED: dict[str, str] = {**COMMON_REFUSED, "neftune_noise_alpha": _UNTESTED}
