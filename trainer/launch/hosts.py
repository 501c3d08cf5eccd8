"""The nodes of a launch: this machine, hosts that ssh reaches, or the nodes of a Slurm allocation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rekatrain.trainer.launch.section import LaunchConfig


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node.

    address:     at which servers listen and the trainers meet
    prefix:      words that start a program there; none for this machine
    environment: variables that a program there does not inherit
    """

    address: str
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def find_hosts(config: LaunchConfig) -> list[Host]:
    """Return the nodes, this machine first."""
    return [Host(address="127.0.0.1")]
