"""`rekatrain plan RECIPE --calibrate FILE`: measure this machine with layers of the recipe's model, and plan with that.

Measured with random weights, on one GPU or on the CPU: a matrix product, copies, a training pass over the recipe's
largest micro-batch, and decoding steps of the in-process sampler (on a GPU, CUDA graphs), with one completion and with
its largest batch. A deep model's time is extrapolated from models of one and two layers. Quantized weights are measured
unquantized, and the network between nodes is not measured.
"""

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.plan.cost import Rates, estimate
from rekatrain.trainer.plan.memory import Plan
from rekatrain.trainer.plan.passes import make_model, run_loss
from rekatrain.trainer.plan.states import base_bytes, is_bfloat16
from rekatrain.trainer.rloo.kernels.cpu import decoding_weights
from rekatrain.trainer.rloo.kernels.grouped_attention import FIRST_ROOM, decoder_and_head, run_decoder
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from rekatrain.trainer.rloo.sampler.adapters import decoding_adapters
from rekatrain.trainer.rloo.sampler.decode_step import CudaGraphs, DecodeStep, EagerCalls
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.static_cache import StaticCache

ROUNDS = 3
# Sizes of the square matrices of a product, and of the tensors that are copied, in bytes.
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 2**27, "cuda": 2**30}
# Decoded tokens that are timed together: with the first two, all rounds fit into FIRST_ROOM.
DECODED_TOKENS = 8


def calibrate(plan: Plan, file: Path) -> Rates:
    """Measure this machine and write the rates to a JSON file; InputError where it cannot be written."""
    device = torch.device("cpu" if plan.launch.is_cpu or not torch.cuda.is_available() else "cuda")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    is_16_bit = is_bfloat16(plan.recipe) or plan.uses_bf16
    disk = _disk_rate(file)  # first: the folder may not exist
    flops = product_rate(device, torch.bfloat16 if is_16_bit else torch.float32)
    memory = copy_rate(device, device)
    measured = {
        "training pass, seconds": _deep(plan, lambda layers: _seconds(training_pass(plan, layers, device)[1], device))
    }
    cost = estimate(plan, Rates())
    needed = cost.flops["train"] * plan.workload.micro_batch_tokens / cost.train_tokens
    rates = Rates(
        name=name,
        flops=flops,
        memory=memory,
        disk=disk,
        training_fraction=needed / measured["training pass, seconds"] / flops,
        measured_on=name,
    )
    if torch.cuda.device_count() > 1:
        # Measured, not a data sheet's rate: nothing is lost of it.
        rates = replace(rates, nvlink=copy_rate(torch.device("cuda:0"), torch.device("cuda:1")), link_fraction=1.0)
    if plan.recipe.stage == "rloo" and not plan.samples_elsewhere:
        batch_size, size = plan.workload.sampler_batch_size, 2 if is_16_bit else 4
        weights = base_bytes(plan.recipe, plan.shape, size)
        seconds = _deep(plan, lambda layers: _decoding_seconds(plan, layers, batch_size, device))
        alone = _deep(plan, lambda layers: _decoding_seconds(plan, layers, 1, device)) / plan.shape.num_layers
        measured |= {"decoding step, seconds": seconds, "decoding one completion, seconds per layer": alone}
        products = 2.0 * plan.shape.num_base * batch_size
        # The estimate is the longest of three times. Each is set so that it gives the measured one.
        key = "adapter_launch_seconds" if plan.recipe.lora else "layer_launch_seconds"
        launch: dict[str, Any] = {key: alone}
        rates = replace(
            rates,
            memory_fraction=weights / seconds / memory,
            sampling_fraction=products / seconds / flops,
            **launch,
        )
    report = {"rates": asdict(rates), "measured": measured, "torch": torch.__version__, "rounds": ROUNDS}
    try:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--calibrate: {str(file)!r} cannot be written: {error.strerror}") from error
    return rates


def read_rates(file: Path) -> Rates:
    """Read the rates that `calibrate` has written; InputError for another file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))["rates"]
        kinds = {field.name: type(field.default) for field in fields(Rates)}
        is_complete = values.keys() == kinds.keys() and all(
            type(value) in ((int, float) if kinds[key] is float else (str,))
            and (kinds[key] is str or 0 < value < float("inf"))
            for key, value in values.items()
        )
    except OSError as error:
        raise InputError(f"--rates: {str(file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise InputError(f"--rates: {str(file)!r} is no file of rates: write one with rekatrain plan --calibrate FILE")
    return Rates(**values)


def _deep(plan: Plan, seconds_of: Callable[[int], float]) -> float:
    """Return the seconds of the whole model, from those of models of one and two layers."""
    layers = plan.shape.num_layers
    one = seconds_of(1)
    return one if layers == 1 else one + (layers - 1) * max(0.0, seconds_of(2) - one)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the median time of an action after a first one, which compiles and allocates."""
    spent = []
    for _ in range(1 + ROUNDS):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        spent.append(time.perf_counter() - began)
    return median(spent[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two large square matrices."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _seconds(lambda: left @ right, device)


def copy_rate(source: torch.device, target: torch.device) -> float:
    """Return bytes per second: read and written within a device, or sent from one device to another."""
    data = torch.ones(COPIED[source.type], dtype=torch.uint8, device=source)
    copied = torch.empty_like(data, device=target)
    sides = 2 if source == target else 1
    return sides * data.nbytes / _seconds(lambda: copied.copy_(data), source)


def _disk_rate(file: Path) -> float:
    """Bytes per second that are written beside the file of rates."""
    data = bytes(2**26)
    try:
        with tempfile.TemporaryFile(dir=file.parent) as target:
            began = time.perf_counter()
            target.write(data)
            target.flush()
            return len(data) / (time.perf_counter() - began)
    except OSError as error:
        raise InputError(f"--calibrate: {str(file.parent)!r} cannot be written: {error.strerror}") from error


def training_pass(plan: Plan, num_layers: int, device: torch.device) -> tuple[Policy, Callable[[], None]]:
    """Return a model with `num_layers` layers, and its forward, loss and backward over the largest micro-batch."""
    workload = plan.workload
    model = make_model(workload, num_layers, plan.checkpoints_activations, str(device))
    parts = workload.largest_micro_batch if plan.recipe.stage == "rloo" else []

    def loss() -> Tensor:
        if plan.recipe.stage != "rloo":
            return run_loss(workload, model)
        completion = [0] * plan.rloo.max_completion_length
        packed = pack_completions(
            [[0] * plan.prompt_tokens] * len(parts),
            [[completion] * len(part.members) for part in parts],
            device,
            is_shared=[part.is_shared for part in parts],
        )
        scored: Tensor = CompletionLogprobs(model, temperature=1.0, num_tokens=workload.config.vocab_size)(packed)
        return scored.sum()

    def train() -> None:
        with torch.device(device), torch.autocast(device.type, torch.bfloat16) if workload.autocasts else nullcontext():
            total = loss()
        total.backward()

    return model, train


def _decoding_seconds(plan: Plan, num_layers: int, batch_size: int, device: torch.device) -> float:
    """Return the seconds in which the sampler decodes one token of each completion, with `num_layers` layers."""
    config = plan.rloo
    model = make_model(plan.workload, num_layers, device=str(device)).eval()
    decoder, head = decoder_and_head(model)
    group = min(batch_size, config.num_generations)
    num_prompts = batch_size // group
    dtype = torch.bfloat16 if plan.workload.autocasts or config.rollout_dtype else None
    with torch.no_grad(), decoding_weights(model, batch_size, dtype), decoding_adapters(model):
        # All tokens that are decoded here fit into the first room: no step is captured twice.
        cache = StaticCache([plan.prompt_tokens] * num_prompts, group, FIRST_ROOM, device)
        ids = torch.zeros(1, num_prompts * plan.prompt_tokens, dtype=torch.long, device=device)
        run_decoder(decoder, ids, cache.prompts.position_ids, cache)
        uniforms_MT = torch.zeros(batch_size, FIRST_ROOM, dtype=torch.float64, device=device)
        last_R = torch.zeros(batch_size, dtype=torch.long, device=device)
        calls = CudaGraphs() if device.type == "cuda" else EagerCalls()
        draw_next = partial(draw, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k)
        step = DecodeStep((decoder, head), cache, draw_next, uniforms_MT, last_R, calls)
        for _ in range(2):  # run, then capture
            step()
        return _seconds(lambda: [step() for _ in range(DECODED_TOKENS)], device) / DECODED_TOKENS
