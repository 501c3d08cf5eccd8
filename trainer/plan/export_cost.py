"""Memory, disk and time of `rekatrain export` of a run: it holds one layer and one shard, never the whole model."""

from dataclasses import dataclass

from rekatrain.trainer.plan.machine import GB
from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.states import is_bfloat16

# The default of --max-shard-size.
SHARD_BYTES = 5 * GB
# Measured by tests/benchmarks/export_memory.py on two models with a LoRA adapter: CPU seconds per GB of stored bfloat16
# weights, on one core. An export reads all layers about nine times, converts and merges them, and runs four short texts
# in each of its two processes.
SECONDS_PER_GB = 40.0


@dataclass(frozen=True, kw_only=True)
class ExportCost:
    """The cost of an export as merged, in bytes and seconds.

    memory:  over the imported program, in each of its two processes, which do not run at the same time
    disk:    of the export
    seconds: about, on one core of a CPU
    """

    memory: float
    disk: float
    seconds: float


def estimate_export(plan: Plan, shard_bytes: float = SHARD_BYTES) -> ExportCost:
    """Return the cost of exporting the plan's run as merged, in shards of that size."""
    shape = plan.shape
    # The embeddings, the head and each layer are merged and run in float32, one after the other.
    layer = max(shape.num_linear / shape.num_layers, shape.largest_module)
    disk = shape.num_base * (2.0 if is_bfloat16(plan.recipe) else 4.0)
    return ExportCost(
        memory=4 * layer + min(shard_bytes, disk), disk=disk, seconds=2 * shape.num_base / GB * SECONDS_PER_GB
    )


def export_line(plan: Plan) -> str:
    """Return the line that `rekatrain plan` prints.

    >>> export_line(plan)  # doctest: +SKIP
    'an export: 41.8 GB, 6.79 GB of memory (a layer in float32 and a shard of --max-shard-size 5GB), about 28 minutes'
    """
    cost = estimate_export(plan)
    gigabytes = [f"{size / GB:.3g}" for size in (cost.disk, cost.memory)]
    return (
        f"an export: {gigabytes[0]} GB of disk, {gigabytes[1]} GB of memory (a layer in float32 and a shard of "
        f"--max-shard-size 5GB), about {max(1, round(cost.seconds / 60)):,} minutes on one CPU core"
    )
