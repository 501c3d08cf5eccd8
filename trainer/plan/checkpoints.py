"""Disk space of a run's checkpoints, and the time to write one."""

from dataclasses import dataclass

from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.states import is_bfloat16, moment_bytes


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of a run, in bytes.

    weights:    trained weights in one checkpoint, as other programs load them
    optimizer:  the optimizer's state, with DeepSpeed also float32 weights, in one checkpoint
    num_kept:   checkpoints on the disk at once, one that is being written included; None if all are kept
    served:     weights that are written in each step for vLLM servers
    num_nodes:  nodes that write the optimizer's shards at the same time
    """

    weights: float
    optimizer: float
    num_kept: int | None
    served: float
    num_nodes: int

    @property
    def size(self) -> float:
        """Bytes of one checkpoint."""
        return self.weights + self.optimizer

    @property
    def disk(self) -> float | None:
        """The most bytes that the run needs on the disk at once; None if all checkpoints are kept."""
        return None if self.num_kept is None else self.num_kept * self.size + self.served

    def seconds(self, rates: Rates) -> float:
        """Return the seconds to write one checkpoint: rank 0 the weights, each node its part of the optimizer."""
        return (self.weights + self.optimizer / self.num_nodes) / rates.disk


def plan_checkpoints(plan: Plan) -> Checkpoints:
    """Return the checkpoints of a plan's run. The base below an adapter is in none of them."""
    recipe, shape, launch = plan.recipe, plan.shape, plan.launch
    section = getattr(recipe, recipe.stage)
    is_sharded = launch.engine == "deepspeed"
    size = 2 if is_bfloat16(recipe) or (is_sharded and plan.uses_bf16) else 4
    if is_sharded:
        # float32 weights and two moments; below stage 3 DeepSpeed writes the trained weights a second time.
        optimizer: float = shape.num_trained * (12 + (size if launch.zero_stage < 3 else 0))
    else:
        optimizer = moment_bytes(recipe, shape, 4 if recipe.lora else size)
    limit = section.get("save_total_limit")
    in_folder = plan.samples_elsewhere and recipe.lora is None and plan.rloo.vllm_weight_transfer == "folder"
    return Checkpoints(
        weights=shape.num_trained * (4 if recipe.lora and not is_sharded else size),
        optimizer=optimizer,
        num_kept=None if limit is None else limit + 1 + (section.get("metric_for_best_model") is not None),
        served=2.0 * shape.num_base if in_folder else 0.0,
        num_nodes=launch.num_nodes,
    )
