"""Find a placement on GPUs that fits, by the plan. placement.py chooses among them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.nodes import ALONE, Node, Placement, find_launch_file
from rekatrain.trainer.launch.section import LaunchConfig
from rekatrain.trainer.plan.cost import Rates
from rekatrain.trainer.plan.machine import GB, PlannedLaunch, read_launch_file
from rekatrain.trainer.plan.memory import Plan, make_plan
from rekatrain.trainer.plan.report import advice_lines, gigabytes, misfits
from rekatrain.trainer.plan.rollout_step import server_ways, simulate_step
from rekatrain.trainer.plan.states import base_bytes
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig

# From the least traffic to the least memory.
CHOICES = ("ddp.yaml", "zero2.yaml", "zero3.yaml", "zero3-offload.yaml")
# Bytes of a server's activations and CUDA graphs; and bytes that a sleeping one keeps. Both are assumptions.
WORKING, SLEEPING = 4 * GB, 3 * GB
# A recipe with servers, for the plan.
SOME_URL = "http://127.0.0.1:8000"


class PlacementFinder:
    """Finds what fits on the GPUs of a node."""

    def __init__(self, recipe: Recipe, config: LaunchConfig, node: Node, ignores_memory: bool) -> None:
        self.recipe, self.config, self.node, self.ignores_memory = recipe, config, node, ignores_memory
        self.gpus = range(node.num_gpus)
        self.served = replace(recipe, rloo={**recipe.rloo, "vllm_server_base_url": SOME_URL})

    def in_process(self) -> Placement:
        """Return the placement without a server: each GPU has a training process."""
        number = self.config.num_processes or self.node.num_gpus
        if number > self.node.num_gpus:
            raise InputError(
                f"launch.num_processes is {number}, but a node has {self.node.num_gpus} GPUs: each process needs one"
            )
        file, plan = self._engine(self.recipe, number, CHOICES)
        return Placement(
            kind="in_process",
            trainer_gpus=self.gpus[:number],
            num_processes=number,
            launch_file=file,
            reason=_fits(plan),
        )

    def split(self) -> Placement:
        """Return the fastest split that fits, of those that the section allows."""
        size, ways = self.node.num_gpus, self._ways()
        steps = []
        for trainers in range(1, size):
            serving = self.config.servers * ways if self.config.servers else (size - trainers) // ways * ways
            total = trainers * self.node.num_nodes
            if serving == 0 or serving + trainers > size or RLOOConfig(**self.recipe.rloo).prompts_per_step % total:
                continue
            if self.config.num_processes not in (None, trainers):
                continue
            step = simulate_step(
                self.served,
                total,
                serving * self.node.num_nodes,
                RLOOConfig(**self.recipe.rloo).prompts_per_step,
                self.node.gpu_memory,
                None,
                Rates(),
            )
            seconds = step.overlapped if self.recipe.rloo.get("max_staleness") else step.on_policy
            steps.append((seconds, trainers, serving))
        if not steps:
            raise InputError(self._no_split(ways))
        reason: InputError | None = None
        for seconds, trainers, serving in sorted(steps):
            try:
                file, plan = self._engine(self.served, trainers, CHOICES)
            except InputError as error:
                reason = reason or error
                continue
            idle = size - trainers - serving
            return Placement(
                kind="split",
                server_gpus=[
                    self.gpus[trainers + start : trainers + start + ways] for start in range(0, serving, ways)
                ],
                trainer_gpus=self.gpus[:trainers],
                num_processes=trainers,
                launch_file=file,
                gpu_memory_utilization=self.config.gpu_memory_utilization,
                reason=f"{_fits(plan)}; estimated step {seconds:,.0f} s" + (f"; {idle} GPU(s) idle" if idle else ""),
            )
        assert reason is not None
        raise reason

    def _no_split(self, ways: int) -> str:
        size, prompts = self.node.num_gpus, RLOOConfig(**self.recipe.rloo).prompts_per_step
        wanted = [
            f"launch.{key} {getattr(self.config, key)}"
            for key in ("servers", "num_processes")
            if getattr(self.config, key)
        ]
        return (
            f"{size} GPU{'s' * (size > 1)} of a node cannot be split into servers of {ways} GPU(s) and training "
            f"processes whose number divides rloo.prompts_per_step ({prompts})"
            + (f" with {' and '.join(wanted)}" if wanted else "")
            + ": set launch.placement to shared, or change these numbers"
        )

    def shared(self) -> Placement:
        """Return one server over all GPUs, which also train under ZeRO-3."""
        size = self.node.num_gpus
        for key in ("tensor_parallel_size", "num_processes"):
            if getattr(self.config, key) not in (None, size):
                raise InputError(
                    f"launch.{key} is {getattr(self.config, key)}, but with placement shared all {size} GPUs serve and "
                    "train: remove it, or set launch.gpus"
                )
        RLOOConfig(**self.recipe.rloo).prompts_per_process(size * self.node.num_nodes)
        file, plan = self._engine(self.served, size, ("zero3.yaml", "zero3-offload.yaml"), reserved=SLEEPING)
        resting = next(phase for phase in plan.phases if phase.name == "sample").gpu_bytes
        utilization = self.config.gpu_memory_utilization
        if utilization is None:
            utilization = min(ALONE, int(100 * (1 - resting / self.node.gpu_memory)) / 100)
        self._check_ways(size, utilization)
        given = utilization * self.node.gpu_memory
        return Placement(
            kind="shared",
            server_gpus=[self.gpus],
            trainer_gpus=self.gpus,
            num_processes=size,
            launch_file=file,
            gpu_memory_utilization=utilization,
            reason=f"{_fits(plan)}; while they rest, {gigabytes(resting)} GB, and the server has {gigabytes(given)}",
        )

    def _ways(self) -> int:
        """Return the number of GPUs of a server, as the plan does."""
        given = self.config.tensor_parallel_size
        plan = make_plan(self.served, PlannedLaunch(gpu_memory=self.node.gpu_memory))
        ways = given or server_ways(plan, self.node.gpu_memory)
        if ways is None:
            raise InputError("a server of this model does not fit on 8 of these GPUs: use larger ones")
        self._check_heads(plan, ways)
        if ways > self.node.num_gpus:
            raise InputError(
                f"a server needs {ways} GPUs"
                + (" (launch.tensor_parallel_size)" if given else "")
                + f", but the run has {self.node.num_gpus} on a node"
            )
        return ways

    def _check_heads(self, plan: Plan, ways: int) -> None:
        heads = plan.config.get_text_config().num_attention_heads
        if heads % ways:
            raise InputError(
                f"a server of {ways} GPUs cannot divide the model's {heads} attention heads: set "
                f"launch.{'gpus' if self.config.placement == 'shared' else 'tensor_parallel_size'} to a divisor of them"
            )

    def _check_ways(self, ways: int, utilization: float) -> None:
        if self._room(ways, utilization) < 1 and not self.ignores_memory:
            raise InputError(
                f"a server with {gigabytes(utilization * self.node.gpu_memory)} GB of each of {ways} GPUs "
                f"(gpu_memory_utilization {utilization:.2f}) has no room for one completion of "
                f"{RLOOConfig(**self.recipe.rloo).max_completion_length} tokens: use more GPUs, or set "
                "launch.placement to split"
            )

    def _room(self, ways: int, utilization: float) -> float:
        """Return how many completions of the maximum length have a cache in a server of `ways` GPUs."""
        plan = make_plan(self.served, PlannedLaunch(gpu_memory=self.node.gpu_memory))
        self._check_heads(plan, ways)
        weights = base_bytes(self.recipe, plan.shape, 2)
        token_bytes = plan.shape.kv_dims * plan.shape.num_layers * 2
        room = (utilization * self.node.gpu_memory - WORKING - weights / ways) * ways
        return room / token_bytes / (plan.prompt_tokens + plan.rloo.max_completion_length)

    def _engine(self, recipe: Recipe, number: int, choices: Sequence[str], reserved: float = 0.0) -> tuple[Path, Plan]:
        """Return the first launch file under which the plan fits on so many GPUs of each node, and the plan.

        reserved: bytes of each GPU that others have
        """
        given = self.config.config_file
        plans: list[Plan] = []
        reason: InputError | None = None
        for name in [given] if given else choices:
            path = find_launch_file("single.yaml" if name == "ddp.yaml" and self._is_alone(number) else name)
            launch = read_launch_file(
                path, gpu_memory=self.node.gpu_memory - reserved, host_memory=self.node.host_memory
            )
            total = number * self.node.num_nodes
            engine = "single" if total == 1 and launch.engine == "ddp" else launch.engine
            launch = replace(launch, engine=engine, num_gpus=total, num_nodes=self.node.num_nodes)
            try:
                plan = make_plan(recipe, launch)
            except InputError as error:  # QLoRA excludes ZeRO-3
                reason = error
                continue
            if self.ignores_memory or plan.fits:
                return path, plan
            plans.append(plan)
        if reason is not None and not plans:
            raise reason
        raise InputError("; ".join([*misfits(plans[-1]), *advice_lines(plans[-1])]) + " (--skip-memory-check)")

    def _is_alone(self, number: int) -> bool:
        return number * self.node.num_nodes == 1


def _fits(plan: Plan) -> str:
    worst = plan.worst
    used, available = gigabytes(worst.gpu_bytes), gigabytes(plan.launch.gpu_memory)
    return f"training needs {used} of {available} GB of a GPU"
