"""A plan as a person reads it."""

from collections.abc import Sequence

from rekatrain.trainer.plan.advice import advise
from rekatrain.trainer.plan.cost import Cost, Rates, estimate
from rekatrain.trainer.plan.live_memory import Parts
from rekatrain.trainer.plan.machine import GB
from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.passes import KV_CACHE
from rekatrain.trainer.plan.states import base_bytes
from rekatrain.trainer.rloo.logprobs import TOKENS_PER_CHUNK


def show(plan: Plan, *, rates: Rates) -> str:
    """The whole report."""
    shape, launch = plan.shape, plan.launch
    lines = [
        f"model: {shape.num_all:,} parameters, {shape.num_trained:,} trained, {shape.num_layers} layers, "
        f"context {shape.context}",
        f"launch: {launch.describe()}",
        *_assumed(plan),
        "",
        _memory_table(plan),
        "",
        *_details(plan),
        "",
        *_verdict(plan),
    ]
    if not launch.is_cpu:
        lines += ["", *_cost_lines(plan, estimate(plan, rates), rates)]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that line up, the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def gigabytes(size: float) -> str:
    """A size in GB of 10^9 bytes."""
    return f"{size / GB:.2f}" if size < 10 * GB else f"{size / GB:.1f}"


def _assumed(plan: Plan) -> list[str]:
    passes = plan.passes
    if plan.recipe.stage != "rloo":
        rows = (
            f"{passes.micro_batch_tokens} tokens a micro-batch of a GPU, {passes.num_micro_batches} of them an update"
        )
        return [f"taken to be: rows of the full length, {rows}"]
    config = plan.rloo
    return [
        f"taken to be: prompts of {plan.prompt_tokens} tokens (--prompt-tokens), completions of all "
        f"{config.max_completion_length}; {plan.prompts} x {config.num_generations} completions a GPU, "
        f"{passes.sampled_at_once} sampled at once, micro-batches of up to {passes.micro_batch_tokens} tokens, "
        f"{passes.num_micro_batches} of them an update"
    ]


def _memory_table(plan: Plan) -> str:
    phases = plan.phases
    parts = list(dict.fromkeys(part for phase in phases for part in phase.gpu))
    rows = [[part, *(gigabytes(phase.gpu[part]) if phase.gpu[part] else "" for phase in phases)] for part in parts]
    rows.append(["all", *(gigabytes(phase.gpu_bytes) for phase in phases)])
    whose = "a process" if plan.launch.is_cpu else "a GPU"
    text = table([f"GB of {whose}", *(phase.name for phase in phases)], rows)
    on_host = list(dict.fromkeys(part for phase in phases for part in phase.host))
    if plan.launch.is_cpu or not on_host:
        return text
    rows = [[part, *(gigabytes(phase.host[part]) if phase.host[part] else "" for phase in phases)] for part in on_host]
    rows.append(["all", *(gigabytes(phase.host_bytes) for phase in phases)])
    return text + "\n\n" + table(["GB of a host", *(phase.name for phase in phases)], rows)


def _details(plan: Plan) -> list[str]:
    with_it, without = (_size(plan.activations(checkpointing=is_on)) for is_on in (True, False))
    lines = [f"activations and logits: {with_it} GB with gradient_checkpointing, {without} GB without"]
    if plan.recipe.stage == "rloo":
        size = 2 if plan.casts or plan.recipe.model.get("dtype", "bfloat16") == "bfloat16" else 4
        rows = min(TOKENS_PER_CHUNK, plan.passes.micro_batch_tokens)
        token = plan.shape.kv_dims * plan.shape.num_layers * size
        lines += [
            f"LM head: {rows} positions at a time, {gigabytes(rows * plan.shape.vocab_rows * size)} GB of logits; "
            "a part of the peak above only where it falls into it",
            f"KV cache: {token:,} bytes a token, {gigabytes(plan.passes.cache()[KV_CACHE])} GB in all",
        ]
        if not plan.launch.is_cpu:
            lines += _rollout_engine(plan, token)
    return lines


def _rollout_engine(plan: Plan, token: int) -> list[str]:
    """What GPUs that only sample would hold, at vLLM's default of 90 % of a GPU (gpu_memory_utilization)."""
    weights = base_bytes(plan.recipe, plan.shape, 2)
    row = plan.prompt_tokens + plan.rloo.max_completion_length
    for ways in (1, 2, 4, 8):
        room = 0.9 * plan.launch.gpu_memory - weights / ways - 4 * GB  # activations, CUDA graphs
        if room > token / ways * row:
            return [
                f"a rollout engine (vLLM, tensor parallel {ways}): {gigabytes(weights / ways)} GB of weights a GPU, a "
                f"cache of {gigabytes(room)} GB: {int(room * ways / token / row)} whole completions at once"
            ]
    return ["a rollout engine: the model fits no 8 such GPUs"]


def _size(parts: Parts) -> str:
    return gigabytes(sum(size for name, size in parts.items() if name != "gradients"))


def _verdict(plan: Plan) -> list[str]:
    if not plan.overfull:
        worst = plan.worst
        return [
            f"fits: phase {worst.name} needs most, {gigabytes(worst.gpu_bytes)} of "
            f"{gigabytes(plan.launch.gpu_memory)} GB"
        ]
    return [*misfits(plan), *advice_lines(plan)]


def misfits(plan: Plan) -> list[str]:
    """A line for each phase that does not fit, with its largest parts."""
    lines = []
    for phase in plan.overfull:
        if phase.gpu_bytes > plan.launch.gpu_memory:
            whose, needed, there, parts = "a GPU", phase.gpu_bytes, plan.launch.gpu_memory, phase.gpu
            whose = "a process" if plan.launch.is_cpu else whose
        else:
            whose, needed, parts = "a host", phase.host_bytes, phase.host
            there = plan.launch.host_memory or 0
        largest = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.most_common(4))
        lines.append(
            f"does not fit: phase {phase.name} needs {gigabytes(needed)} GB of {whose}'s {gigabytes(there)} ({largest})"
        )
    return lines


def advice_lines(plan: Plan) -> list[str]:
    """What to change, each line of which has been planned and fits."""
    texts = [change.text for change in advise(plan)]
    if [phase.name for phase in plan.overfull] == ["sample"] and not plan.launch.is_cpu:
        texts.insert(0, "rloo.vllm_server_base_url=URL (servers on other GPUs sample; these keep all else)")
    if not texts:
        return ["no change that is known here makes it fit: a smaller model, or shorter rows"]
    return ["any of these makes it fit, nearest first:", *(f"  {text}" for text in texts)]


def _cost_lines(plan: Plan, cost: Cost, rates: Rates) -> list[str]:
    seconds = cost.seconds
    arithmetic = ", ".join(f"{name} {count / 1e12:,.0f}" for name, count in cost.flops.items())
    traffic = ", ".join(f"{name} {gigabytes(size)}" for name, size in cost.traffic.items()) or "none"
    times = ", ".join(f"{name} {value:,.1f}" for name, value in seconds.items())
    copies = plan.launch.num_copies
    lines = [
        f"a step of a GPU: {cost.train_tokens:,} tokens trained, {cost.sampled_tokens:,} sampled",
        f"  arithmetic, TFLOP: {arithmetic}",
        f"  traffic, GB: {traffic}",
        f"  time, s: {times}; between {max(seconds.values()):,.0f} s (all at the same time) and "
        f"{sum(seconds.values()):,.0f} s (one after the other), "
        f"{cost.train_tokens * copies / sum(seconds.values()):,.0f} trained tokens a second over all GPUs",
        f"  at {rates.describe()}; completions are taken to run to their cap",
    ]
    return lines
