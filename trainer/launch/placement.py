"""The division of a node's GPUs between servers and training: the section `launch:` decides, then the plan.

split:      the GPUs are divided between vLLM servers and training processes; the split with the shortest step by the
            estimates of `rekatrain plan --scale-out`, of those that fit
shared:     one server with tensor parallelism spans the GPUs that train under ZeRO-3, by turns (sampler/vllm/sleep.py).
            The plan divides the memory: the server gets what the resting trainer leaves
in_process: no server: the training processes sample, or the stage samples nothing

Without a GPU there is one server and one training process. Without the section, RLOO is split; shared is chosen where
no split fits.
"""

import math
from dataclasses import replace

from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.gpus import PlacementFinder
from rekatrain.trainer.launch.nodes import Node, Placement, find_launch_file
from rekatrain.trainer.launch.section import LaunchConfig
from rekatrain.trainer.plan.machine import PlannedLaunch, read_launch_file
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig


def place(
    recipe: Recipe, config: LaunchConfig, node: Node, *, has_vllm: bool, ignores_memory: bool = False
) -> Placement:
    """Decide the placement; raise InputError if it is impossible or, without `ignores_memory`, does not fit.

    has_vllm: True if an environment with vLLM is known
    """
    samples = recipe.stage == "rloo" and not recipe.rloo.get("vllm_server_base_url")
    kind = config.placement if samples and (config.placement or has_vllm) else "in_process"
    placement = _place(recipe, kind, config, node, ignores_memory)
    if recipe.stage == "rloo":
        RLOOConfig(**recipe.rloo).prompts_per_process(placement.num_processes * node.num_nodes)
    return placement


def _place(recipe: Recipe, kind: str | None, config: LaunchConfig, node: Node, ignores_memory: bool) -> Placement:
    if node.num_gpus == 0:
        return _on_cpu(recipe, kind, config, node)
    finder = PlacementFinder(recipe, config, node, ignores_memory)
    if kind == "in_process":
        return finder.in_process()
    if kind == "shared":
        return finder.shared()
    if kind == "split" or config.servers or (config.num_processes or node.num_gpus) < node.num_gpus:
        return finder.split()
    try:
        return finder.split()
    except InputError as no_split:
        try:
            return finder.shared()
        except InputError:
            raise no_split from None


def _on_cpu(recipe: Recipe, kind: str | None, config: LaunchConfig, node: Node) -> Placement:
    if kind == "shared":
        raise InputError("launch.placement shared divides GPUs, and there is none: set it to split")
    for key in ("tensor_parallel_size", "gpu_memory_utilization"):
        if getattr(config, key) not in (None, 1):
            raise InputError(f"launch.{key} is {getattr(config, key)}, but servers on a CPU have no GPU: remove it")
    processes = config.num_processes or 1
    usual = "single.yaml" if processes * node.num_nodes == 1 else "ddp.yaml"
    file = find_launch_file(config.config_file or usual)
    launch = read_launch_file(file, gpu_memory=node.gpu_memory)
    replace(launch, num_gpus=processes * node.num_nodes, num_nodes=node.num_nodes)  # its check, before a server starts
    servers = 0 if kind == "in_process" else config.servers or 1
    return Placement(
        kind="in_process" if kind == "in_process" else "split",
        server_gpus=[[]] * servers,
        num_processes=processes,
        launch_file=file,
        cpu_cache=_cache_gib(recipe) if servers else None,
        reason="without a GPU",
    )


def _cache_gib(recipe: Recipe) -> int:
    """Return the GiB of KV cache, in float32, of all completions of a step: vLLM would use 90 % of the memory."""
    plan = make_plan(recipe, PlannedLaunch(num_gpus=1))
    token_bytes = 4 * plan.shape.kv_dims * plan.shape.num_layers
    completions = plan.rloo.prompts_per_step * plan.rloo.num_generations
    return math.ceil(completions * token_bytes * (plan.prompt_tokens + plan.rloo.max_completion_length) / 2**30)
