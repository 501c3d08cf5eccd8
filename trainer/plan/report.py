"""Print a plan as text."""

from collections.abc import Sequence

from rekatrain.trainer.plan.advice import advise
from rekatrain.trainer.plan.checkpoints import plan_checkpoints
from rekatrain.trainer.plan.cost import CALIBRATION, Cost, Rates, estimate
from rekatrain.trainer.plan.export_cost import export_line
from rekatrain.trainer.plan.live_memory import Parts
from rekatrain.trainer.plan.machine import GB
from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.states import base_bytes, is_bfloat16
from rekatrain.trainer.rloo.logprobs import TOKENS_PER_CHUNK


def render_plan(plan: Plan, *, rates: Rates) -> str:
    """Return the text that `rekatrain plan` prints: model, launch, memory tables, verdict, and cost of a step."""
    shape, launch = plan.shape, plan.launch
    lines = [
        f"model: {shape.num_all:,} parameters, {shape.num_trained:,} trained, {shape.num_layers} layers, "
        f"context of {shape.context} tokens",
        f"launch: {launch.describe()}",
        *_assumptions(plan),
        "",
        _memory_table(plan),
        "",
        *_details(plan),
        "",
        *_verdict(plan),
        "",
        *_checkpoint_lines(plan, rates),
    ]
    if not launch.is_cpu or rates.measured_on:
        lines += ["", *_cost_lines(plan, estimate(plan, rates), rates)]
    return "\n".join(lines)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a text table; the first column is aligned to the left, the others to the right."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def gigabytes(size: float) -> str:
    """Return a number of bytes in GB (10^9 bytes), rounded for display.

    >>> gigabytes(1.234e9), gigabytes(12.34e9)
    ('1.23', '12.3')
    """
    return f"{size / GB:.2f}" if size < 10 * GB else f"{size / GB:.1f}"


def _assumptions(plan: Plan) -> list[str]:
    workload = plan.workload
    batches = (
        f"{workload.num_micro_batches} micro-batches per update, at most {workload.micro_batch_tokens} tokens each"
        + (f", split among {workload.sequence_parallel} GPUs" if workload.sequence_parallel > 1 else "")
    )
    if plan.recipe.stage != "rloo":
        return [f"assumed: every sequence has the maximum length; per GPU: {batches}"]
    config = plan.rloo
    return [
        f"assumed: prompts of {plan.prompt_tokens} tokens (--prompt-tokens), completions of the maximum length, "
        f"{config.max_completion_length} tokens",
        f"per GPU: {plan.num_prompts} x {config.num_generations} completions, {workload.sampler_batch_size} sampled at "
        f"a time; {batches}",
    ]


def _memory_table(plan: Plan) -> str:
    phases = plan.phases
    parts = list(dict.fromkeys(part for phase in phases for part in phase.gpu))
    lines = [[part, *(gigabytes(phase.gpu[part]) if phase.gpu[part] else "" for phase in phases)] for part in parts]
    lines.append(["total", *(gigabytes(phase.gpu_bytes) for phase in phases)])
    owner = "process" if plan.launch.is_cpu else "GPU"
    text = "peak memory of each phase, in GB (10^9 bytes)\n"
    text += table([f"per {owner}", *(phase.name for phase in phases)], lines)
    on_host = list(dict.fromkeys(part for phase in phases for part in phase.host))
    if plan.launch.is_cpu or not on_host:
        return text
    lines = [[part, *(gigabytes(phase.host[part]) if phase.host[part] else "" for phase in phases)] for part in on_host]
    lines.append(["total", *(gigabytes(phase.host_bytes) for phase in phases)])
    return text + "\n\n" + table(["per host", *(phase.name for phase in phases)], lines)


def _details(plan: Plan) -> list[str]:
    with_checkpointing, without = (_size(plan.activations(checkpointing=is_on)) for is_on in (True, False))
    lines = [f"activations and logits: {with_checkpointing} GB with gradient_checkpointing, {without} GB without"]
    if plan.recipe.stage == "rloo":
        size = 2 if plan.uses_bf16 or is_bfloat16(plan.recipe) else 4
        tokens = min(TOKENS_PER_CHUNK, plan.workload.micro_batch_tokens)
        token_bytes = plan.workload.kv_bytes_per_token
        in_process = f"{gigabytes(plan.workload.kv_cache_bytes)} GB in total"
        cache = "on the servers" if plan.samples_elsewhere else in_process
        lines += [
            f"LM head: {tokens} tokens at a time, {gigabytes(tokens * plan.shape.vocab_size * size)} GB of logits "
            "(in the table only if they are in memory at the peak)",
            f"KV cache: {token_bytes:,} bytes per token, {cache}",
        ]
        if not plan.launch.is_cpu:
            lines += _vllm_lines(plan, token_bytes)
    return lines


def _vllm_lines(plan: Plan, token_bytes: int) -> list[str]:
    """Describe a vLLM server on GPUs of this size, at its default of 90 % of a GPU (gpu_memory_utilization)."""
    weights = base_bytes(plan.recipe, plan.shape, 2)
    sequence = plan.prompt_tokens + plan.rloo.max_completion_length
    for ways in (1, 2, 4, 8):
        # 4 GB are assumed for activations and CUDA graphs.
        room = 0.9 * plan.launch.gpu_memory - weights / ways - 4 * GB
        if room > token_bytes / ways * sequence:
            return [
                f"a vLLM server (tensor parallel size {ways}): {gigabytes(weights / ways)} GB of weights and "
                f"{gigabytes(room)} GB of KV cache per GPU, for {int(room * ways / token_bytes / sequence)} "
                "completions of the maximum length"
            ]
    return ["a vLLM server: the model does not fit on 8 of these GPUs"]


def _size(parts: Parts) -> str:
    return gigabytes(sum(size for name, size in parts.items() if name != "gradients"))


def _verdict(plan: Plan) -> list[str]:
    if not plan.overfull:
        worst = plan.worst
        return [
            f"fits: phase {worst.name} needs the most, {gigabytes(worst.gpu_bytes)} of "
            f"{gigabytes(plan.launch.gpu_memory)} GB per {'process' if plan.launch.is_cpu else 'GPU'}"
        ]
    return [*misfits(plan), *advice_lines(plan)]


def misfits(plan: Plan) -> list[str]:
    """Return one line per phase that does not fit, with its largest parts."""
    lines = []
    for phase in plan.overfull:
        if phase.gpu_bytes > plan.launch.gpu_memory:
            owner = "process" if plan.launch.is_cpu else "GPU"
            needed, available, parts = phase.gpu_bytes, plan.launch.gpu_memory, phase.gpu
        else:
            owner = "host"
            needed, available, parts = phase.host_bytes, plan.launch.host_memory or 0, phase.host
        largest = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.most_common(4))
        lines.append(
            f"does not fit: phase {phase.name} needs {gigabytes(needed)} of {gigabytes(available)} GB per {owner} "
            f"({largest})"
        )
    return lines


def advice_lines(plan: Plan) -> list[str]:
    """Return the lines that recommend changes; each change was planned and fits."""
    texts = [change.text for change in advise(plan)]
    if [phase.name for phase in plan.overfull] == ["sample"] and not plan.launch.is_cpu:
        texts.insert(0, "rloo.vllm_server_base_url=URL (sample with vLLM servers on other GPUs)")
    if not texts:
        return ["no known change makes it fit: use a smaller model or shorter sequences"]
    return ["each of these changes makes it fit:", *(f"  {text}" for text in texts)]


def _checkpoint_lines(plan: Plan, rates: Rates) -> list[str]:
    """Describe the disk space and the time of checkpoints, and what is served from the disk."""
    checkpoints = plan_checkpoints(plan)
    section = getattr(plan.recipe, plan.recipe.stage)
    kept = "all are kept: set save_total_limit"
    if checkpoints.disk is not None:
        kept = f"at most {checkpoints.num_kept} at a time, {gigabytes(checkpoints.disk)} GB of disk"
    served = f" with {gigabytes(checkpoints.served)} GB that are written for the servers in each step"
    lines = [
        f"a checkpoint: {gigabytes(checkpoints.size)} GB ({gigabytes(checkpoints.weights)} of weights, "
        f"{gigabytes(checkpoints.optimizer)} of optimizer); {kept}{served if checkpoints.served else ''}",
        f"saving: {checkpoints.seconds(rates):,.0f} s at an assumed {rates.disk / GB:.0f} GB/s per node, every "
        f"{section.get('save_steps', {'rloo': 50}.get(plan.recipe.stage, 500))} steps",
        export_line(plan),
    ]
    host = max(phase.host_bytes for phase in plan.phases)
    return lines if plan.launch.is_cpu else [f"host memory: {gigabytes(host)} GB per node at the most", *lines]


def _cost_lines(plan: Plan, cost: Cost, rates: Rates) -> list[str]:
    seconds = cost.seconds
    arithmetic = ", ".join(f"{name} {count / 1e12:,.0f}" for name, count in cost.flops.items())
    traffic = ", ".join(f"{name} {gigabytes(size)}" for name, size in cost.traffic.items()) or "none"
    times = ", ".join(f"{name} {value:,.1f}" for name, value in seconds.items())
    copies = plan.launch.num_copies
    lines = [
        f"one step on one GPU: {cost.train_tokens:,} tokens trained, {cost.sampled_tokens:,} sampled",
        f"  arithmetic (TFLOP): {arithmetic}",
        f"  traffic (GB): {traffic}",
        f"  time (s, estimated for {rates.name} whatever --gpu-memory is): {times}",
        f"  total: {max(seconds.values()):,.0f} s if all overlap, {sum(seconds.values()):,.0f} s if none do "
        f"({cost.train_tokens * copies / sum(seconds.values()):,.0f} trained tokens per second on all GPUs)",
        f"  rates: {rates.describe()}",
    ]
    if plan.recipe.stage == "rloo" and plan.samples_elsewhere:
        lines.append("  vLLM servers sample, whose time is not in it: --scale-out estimates both")
    if rates.measured_on:
        return [*lines, f"  these times are estimates from rates that --calibrate measured on {rates.measured_on}"]
    return [*lines, f"  these times are estimates, fitted to: {'; '.join(CALIBRATION)}"]
