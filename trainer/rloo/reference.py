"""The policy that a run begins with, which a KL is measured against."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from peft import PeftModel
from rekatrain.trainer.models import Policy
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import autocast, frozen, zero_stage
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, PackedCompletions
from torch import Tensor

Reference = Callable[[PackedCompletions], Tensor]


def make_reference(
    accelerator: Accelerator,
    model: CompletionLogprobs,
    config: RLOOConfig,
    load_again: Callable[[], Policy] | None = None,
) -> Reference | None:
    """Log-probabilities under the policy that the run begins with; None where beta is 0 and nobody asks for them.

    With LoRA that policy is the model without its adapter and costs no memory; otherwise it is a copy of the live one,
    or under ZeRO-3, where a copy would be of shards, what `load_again` gives, sharded likewise. It computes in the
    policy's arithmetic: what only rounding makes different is no KL.
    """
    if config.beta == 0:
        return None
    policy = model.policy
    initial: torch.nn.Module
    if isinstance(policy, PeftModel):
        initial = model
    elif load_again is not None and zero_stage(accelerator) == 3:
        again = CompletionLogprobs(load_again(), temperature=model.temperature, num_tokens=model.num_tokens)
        initial = frozen(accelerator, again)
    else:
        initial = frozen(accelerator, copy.deepcopy(model))

    def reference_logprobs(rows: PackedCompletions) -> Tensor:
        without_adapter = policy.disable_adapter() if isinstance(policy, PeftModel) else nullcontext()
        with torch.no_grad(), without_adapter, autocast(accelerator):
            scored: Tensor = initial(replace(rows, cutoffs=None))  # every token, whatever the sampler left out
            return scored

    return reference_logprobs
