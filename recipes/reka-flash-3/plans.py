"""Print the table of recipes/README.md: the answer of `rekatrain plan` to each recipe of this folder.

python recipes/reka-flash-3/plans.py
"""

from pathlib import Path

from rekatrain.trainer.plan.checkpoints import plan_checkpoints
from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.machine import GB, read_launch_file
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.plan.plan import with_servers
from rekatrain.trainer.recipe.load import load_recipe

FOLDER = Path(__file__).parent
# Recipe -> launch file, GPUs that train, and GB of one. Other GPUs of the node serve rollouts and the reward model.
LAUNCHES = {
    "sft-qlora": ("single", 1, 40),
    "sft-lora": ("ddp", 8, 80),
    "sft-full": ("zero3", 8, 80),
    "reward": ("ddp", 8, 80),
    "rloo-8k": ("ddp", 4, 80),
    "rloo-16k": ("ddp", 4, 80),
    "rloo-32k": ("zero3", 4, 80),
    "rloo-3.1": ("ddp", 4, 80),
    "rloo-full": ("zero3-offload", 4, 80),
}
HOST_MEMORY = 512 * GB
HEADER = ("recipe", "launch file", "trains on", "GB per GPU", "host GB", "checkpoint GB", "disk GB", "seconds to save")


def make(name: str) -> Plan:
    """Return the plan of a recipe on its launch."""
    file, num_gpus, memory = LAUNCHES[name]
    launch = read_launch_file(
        FOLDER.parent / "accelerate" / f"{file}.yaml",
        gpu_memory=memory * GB,
        host_memory=HOST_MEMORY,
        num_gpus=num_gpus,
    )
    return make_plan(with_servers(load_recipe(FOLDER / f"{name}.yaml")), launch)


def line(name: str) -> str:
    """Return the row of a recipe."""
    plan = make(name)
    checkpoints = plan_checkpoints(plan)
    assert checkpoints.disk is not None
    file, num_gpus, memory = LAUNCHES[name]
    cells = [
        f"`{name}`",
        f"`{file}`",
        f"{num_gpus} x {memory} GB",
        f"{plan.worst.gpu_bytes / GB:.1f}" + ("" if plan.fits else ": does not fit"),
        f"{max(phase.host_bytes for phase in plan.phases) / GB:.0f}",
        f"{checkpoints.size / GB:.1f}",
        f"{checkpoints.disk / GB:.0f}",
        f"{checkpoints.seconds(Rates()):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    print(f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}", *map(line, LAUNCHES), sep="\n")


if __name__ == "__main__":
    main()
