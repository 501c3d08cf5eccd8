"""The LM head in float32: `rloo.cast_lm_head_to_fp32`.

In bfloat16 a logit of 20 is rounded to steps of 1/8, in sampler and trainer at different values; ScaleRL (arXiv
2510.13786) found that float32 logits let both agree better. The hidden states stay as they are; the product and the
logits are in float32. A float32 model does not change.
"""

import torch
from torch import Tensor, nn

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.grouped_attention import decoder_and_head


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtypes of its weight, its inputs and autocast are."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply copies in float32; the weight's gradient is rounded to its dtype once, at the end."""
        with torch.autocast(inputs.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(inputs.float(), self.weight.float(), bias)


def compute_head_in_float32(policy: Policy) -> None:
    """Have the output layer of a policy compute in float32, in the sampler too; its weight keeps its dtype.

    The layer changes its class and not its `forward`, which wrappers (DeepSpeed, `decoding_weights`) replace.
    """
    _, head = decoder_and_head(policy)
    for module in head.modules():  # with `modules_to_save` it is a wrapper of two layers
        if isinstance(module, nn.Linear):
            module.__class__ = Float32Linear
