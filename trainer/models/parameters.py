"""The trained parameters of a model, and a context in which they have other values."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def trained_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the trained parameters of a model, with their names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def replaced(parameters: Sequence[tuple[str, nn.Parameter]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which parameters have other values, in their own dtype and on their own device."""
    kept = [parameter.data for _, parameter in parameters]
    try:
        for name, parameter in parameters:
            parameter.data = values[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for (_, parameter), data in zip(parameters, kept, strict=True):
            parameter.data = data
