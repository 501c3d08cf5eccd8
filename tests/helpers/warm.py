"""Modules that a run imports late. A fork server imports this module once, and every run starts with all of them."""

import accelerate.commands.launch  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import trl.trainer.sft_trainer  # noqa: F401

import rekatrain.trainer.cli  # noqa: F401
import rekatrain.trainer.plan.plan  # noqa: F401
import rekatrain.trainer.rloo.train  # noqa: F401
import rekatrain.trainer.sft  # noqa: F401
