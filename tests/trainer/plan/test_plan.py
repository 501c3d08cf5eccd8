"""`rekatrain plan`: static memory as DeepSpeed counts it, which launches fit, advice, rejected settings, output."""

import json
import logging
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.plan.advice import advise
from rekatrain.trainer.plan.cost import Rates, estimate
from rekatrain.trainer.plan.machine import GB, PlannedLaunch, read_launch_file
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.plan.model_size import ModelShape
from rekatrain.trainer.plan.plan import with_servers
from rekatrain.trainer.plan.rollout_step import simulate_step
from rekatrain.trainer.plan.states import count_states
from rekatrain.trainer.recipe.load import Recipe, load_recipe

ROOT = Path(__file__).parents[3]
DDP = PlannedLaunch(engine="ddp", num_gpus=8)


def zero(stage: int, num_gpus: int = 8, **more: Any) -> PlannedLaunch:
    return PlannedLaunch(
        engine="deepspeed", zero_stage=stage, num_gpus=num_gpus, num_nodes=max(1, num_gpus // 8), **more
    )


def reka(name: str, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "reka-flash-3" / f"{name}.yaml", overrides)


def in_process(name: str, *overrides: str) -> Recipe:
    """A recipe of stage rloo whose training processes sample short completions themselves, with a KL."""
    short = ["prompts_per_step=64", "num_generations=8", "max_completion_length=1536", "micro_batch_tokens=16384"]
    others = ["per_device_generation_batch_size=32", "beta=0.02", "vllm_server_base_url=null"]
    return reka(name, *(f"rloo.{override}" for override in (*short, *others)), *overrides)


# Model states


@pytest.mark.parametrize("num_gpus", [1, 8, 16])
@pytest.mark.parametrize(
    ("stage", "offload"), [(2, "nothing"), (2, "optimizer"), (3, "nothing"), (3, "optimizer"), (3, "all")]
)
def test_count_states_agrees_with_deepspeeds_estimators(stage: int, offload: str, num_gpus: int) -> None:
    launch = zero(stage, num_gpus, offload_optimizer=offload != "nothing", offload_parameters=offload == "all")
    plan = make_plan(reka("sft-full"), launch)
    counted = count_states(plan.recipe, plan.shape, launch, uses_bf16=True)
    nodes = {"num_gpus_per_node": launch.gpus_per_node, "num_nodes": launch.num_nodes, "additional_buffer_factor": 1}
    on_gpu = counted.weights.total() + counted.gradients + counted.optimizer
    if stage == 2:
        host, gpu = estimate_zero2_model_states_mem_needs(plan.shape.num_all, cpu_offload=offload != "nothing", **nodes)
        largest = 0
    else:
        host, gpu, largest = estimate_zero3_model_states_mem_needs(
            plan.shape.num_all,
            plan.shape.largest_module,
            cpu_offload=offload != "nothing",
            cpu_offload_params=offload == "all",
            **nodes,
        )
    # The estimators count gradients of 2 bytes; micro-batches are added up in float32.
    in_float32 = 0 if offload != "nothing" else 2 * plan.shape.num_all / launch.shards(2)
    assert on_gpu == pytest.approx(gpu - largest + in_float32, rel=1e-6)
    # For stage 2 the estimator also counts, on the host, the model that every process loads.
    if offload != "nothing" and stage == 3:
        assert counted.host.total() == pytest.approx(host, rel=1e-6)


def test_deepspeeds_estimator_gives_its_published_figure() -> None:
    shape = make_plan(reka("sft-full"), zero(3)).shape
    assert estimate_zero3_model_states_mem_needs(shape.num_all, shape.largest_module, 8, 1, cpu_offload=False)[
        1
    ] / 2**30 == pytest.approx(46.1, abs=0.1)


# Reka Flash 3, from its config


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return make_plan(in_process("rloo-8k"), DDP).shape


def test_measure_shape_counts_reka_flash_3_exactly(shape: ModelShape) -> None:
    assert (shape.num_base, shape.num_adapter, shape.num_trained) == (20_905_482_240, 81_506_304, 81_506_304)
    assert shape.num_linear + 2 * shape.num_head + (2 * 44 + 1) * 6144 == shape.num_base
    assert 2 * shape.kv_dims * shape.num_layers == 135_168  # bytes of cache a token in bfloat16
    assert (shape.largest_module, shape.vocab_size, shape.context) == (100_352 * 6144, 100_352, 32_768)


def test_load_config_logs_a_shipped_config_once_per_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rekatrain.trainer.plan.model_size")
    for name in ("sft-lora", "sft-full"):
        recipe = reka(name, "model.pretrained_model_name_or_path=someone/reka-flash-3")
        assert make_plan(recipe, zero(3)).shape.num_base == 20_905_482_240
    assert [record.getMessage() for record in caplog.records] == [
        "plan: someone/reka-flash-3 cannot be loaded; using the architecture in reka-flash-3.json"
    ]


@pytest.mark.parametrize(("rank", "count"), [(8, 40.8e6), (16, 81.5e6), (32, 163.0e6)])
def test_measure_shape_grows_an_adapter_with_its_rank(rank: int, count: float) -> None:
    assert make_plan(reka("sft-lora", f"lora.r={rank}"), DDP).shape.num_adapter == pytest.approx(count, rel=2e-3)


@pytest.mark.parametrize("num_gpus", [2, 8, 64])
def test_count_states_divides_zero3_states_evenly(num_gpus: int) -> None:
    states = make_plan(reka("sft-full"), zero(3, num_gpus)).states
    assert states.weights["parameters"] * num_gpus == pytest.approx(2 * 20_905_482_240)
    assert states.gradients * num_gpus == pytest.approx(4 * 20_905_482_240)  # added up in float32


# What fits 8 GPUs of 80 GB


@pytest.mark.parametrize(
    ("name", "launch"),
    [
        ("sft-lora", DDP),
        ("sft-full", zero(3)),
        ("sft-qlora", PlannedLaunch(gpu_memory=40 * GB)),
        ("reward", DDP),
        ("rloo-8k", replace(DDP, num_gpus=4)),
        ("rloo-16k", replace(DDP, num_gpus=4)),
        ("rloo-32k", zero(3, 4)),
        ("rloo-3.1", replace(DDP, num_gpus=4)),
        ("rloo-full", zero(3, 4, offload_optimizer=True, offload_parameters=True, host_memory=512 * GB)),
    ],
)
def test_make_plan_fits_every_21b_recipe_on_its_launch(name: str, launch: PlannedLaunch) -> None:
    plan = make_plan(with_servers(reka(name)), launch)
    assert plan.overfull == []
    assert plan.worst.gpu_bytes > 20 * GB  # the model is counted


def test_make_plan_fits_full_rloo_except_sampling() -> None:
    plan = make_plan(in_process("rloo-full"), zero(3))
    assert [phase.name for phase in plan.overfull] == ["sample"]
    assert plan.phases[1].gpu["rollout weights"] == 2 * 20_905_482_240


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "launch"),
    [
        (reka("sft-lora", "sft.gradient_checkpointing=false"), DDP),
        (reka("sft-full"), DDP),
        (in_process("rloo-8k", "rloo.micro_batch_tokens=65536"), DDP),
        (in_process("rloo-full"), zero(3)),
    ],
    ids=["activations", "states", "batches", "rollouts"],
)
def test_advise_returns_changes_that_fit(recipe: Recipe, launch: PlannedLaunch) -> None:
    plan = make_plan(recipe, launch)
    assert plan.overfull
    changes = advise(plan)
    assert changes
    for change in changes:
        assert make_plan(change.recipe, change.launch).overfull == [], change.text


def test_advise_starts_with_a_change_that_keeps_the_result() -> None:
    plan = make_plan(reka("sft-lora", "sft.gradient_checkpointing=false"), DDP)
    assert advise(plan)[0].text.startswith("sft.gradient_checkpointing=true")


def test_advise_combines_qlora_with_smaller_batches() -> None:
    """QLoRA excludes ZeRO-3: the change that has it keeps the launch."""
    plan = make_plan(in_process("rloo-8k"), PlannedLaunch(engine="ddp", num_gpus=4, gpu_memory=24 * GB))
    [change] = [change for change in advise(plan) if "load_in_4bit: true" in change.text]
    assert change.launch == plan.launch
    assert "rloo.micro_batch_tokens=1024" in change.text
    assert make_plan(change.recipe, change.launch).fits


# Long sequences


def test_make_plan_fits_32k_under_zero3_and_96k_with_ulysses() -> None:
    flash = "model.attn_implementation=flash_attention_2"
    assert make_plan(reka("sft-lora", "sft.max_length=32768", flash), zero(3)).overfull == []
    of_3_1 = "model.pretrained_model_name_or_path=RekaAI/reka-flash-3.1"
    long = reka("sft-lora", "sft.max_length=98304", flash, of_3_1)
    assert make_plan(long, zero(3)).overfull != []
    assert make_plan(long, zero(3, sequence_parallel=4)).overfull == []


def test_make_plan_rejects_sequences_beyond_the_context() -> None:
    with pytest.raises(InputError, match=r"sft\.max_length \(98304\) exceeds the model's context of 32768"):
        make_plan(reka("sft-lora", "sft.max_length=98304"), zero(3)).phases  # noqa: B018  # computed on first use


def test_make_plan_fits_rloo_by_sequence_parallelism() -> None:
    # One completion of the greatest length in a micro-batch: its activations are split among the processes.
    recipe, ddp = with_servers(reka("rloo-32k")), PlannedLaunch(engine="ddp", num_gpus=4)
    whole, split = (make_plan(recipe, replace(ddp, sequence_parallel=size)) for size in (1, 4))
    assert not whole.fits and split.fits
    activations = [plan.activations(checkpointing=True)["activations"] for plan in (whole, split)]
    assert 0.25 <= activations[1] / activations[0] < 0.27
    assert whole.workload.micro_batch_tokens == pytest.approx(split.workload.micro_batch_tokens, abs=4)
    assert split.workload.num_micro_batches == 4 * whole.workload.num_micro_batches  # for 4 times the prompts
    assert "split sequences: parallelism_config_sp_size: 4" in " ".join(change.text for change in advise(whole))


@pytest.mark.parametrize(
    ("recipe", "launch", "message"),
    [
        ("rloo-8k", {"num_gpus": 6, "sequence_parallel": 3}, "sp_size is 3, .* 6 processes it can be 1 or 2$"),
        ("sft-lora", {"num_gpus": 8, "sequence_parallel": 4}, "stage sft splits sequences under DeepSpeed only"),
    ],
)
def test_make_plan_rejects_sequences_that_cannot_be_split(recipe: str, launch: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(in_process(recipe), PlannedLaunch(engine="ddp", **launch)).phases  # type: ignore[arg-type]  # noqa: B018


def test_planned_launch_rejects_groups_that_do_not_divide_the_processes() -> None:
    with pytest.raises(InputError, match="sp_size 3 does not divide 8 processes"):
        PlannedLaunch(engine="ddp", num_gpus=8, sequence_parallel=3)


# Properties


def test_make_plan_needs_less_gpu_memory_with_more_sharding() -> None:
    needed = [make_plan(reka("sft-full"), zero(stage)).worst.gpu_bytes for stage in (1, 2, 3)]
    assert needed == sorted(needed, reverse=True)
    assert len(set(needed)) == 3


def test_make_plan_rejects_qlora_without_gpu_adapter_or_whole_base() -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        make_plan(load_recipe(ROOT / "recipes/smollm2/sft-qlora.yaml"), PlannedLaunch(is_cpu=True))
    with pytest.raises(InputError, match="needs a lora: section"):
        make_plan(reka("sft-qlora", "lora=null"), PlannedLaunch())
    with pytest.raises(InputError, match="which ZeRO-3 would shard"):
        make_plan(reka("sft-qlora"), zero(3))
    assert make_plan(reka("sft-qlora"), zero(2)).fits


def test_estimate_counts_arithmetic_as_the_roofline_does() -> None:
    plan = make_plan(in_process("rloo-8k", "lora=null", "rloo.beta=0.0", "rloo.gradient_checkpointing=false"), zero(3))
    cost = estimate(plan, Rates())
    config, prompt = plan.rloo, plan.prompt_tokens
    tokens = plan.num_prompts * (prompt + config.num_generations * (config.max_completion_length - 1))
    assert cost.train_tokens == tokens
    linear = 6 * (plan.shape.num_linear + plan.shape.num_head) * tokens
    assert 1.0 < cost.flops["train"] / linear < 1.1  # attention is added
    assert cost.traffic["parameters gathered"] == pytest.approx(
        2 * 7 / 8 * 2 * plan.shape.num_base * plan.workload.num_micro_batches
    )


def test_simulate_step_halves_rollouts_with_twice_the_servers() -> None:
    recipe = in_process("rloo-8k")
    steps = [simulate_step(recipe, 64, servers, 4096, 80 * GB, None, Rates()) for servers in (64, 128)]
    assert steps[0].rollouts == pytest.approx(2 * steps[1].rollouts, rel=0.01)
    assert steps[0].longest_completion == steps[1].longest_completion
    crowded = simulate_step(recipe, 64, 4096, 64, 80 * GB, None, Rates())
    assert crowded.sampling >= crowded.longest_completion == steps[0].longest_completion


# Launch files


@pytest.mark.parametrize(
    ("tree", "engine", "stage", "gpus"),
    [
        ({"distributed_type": "NO"}, "single", 0, 1),
        ({"distributed_type": "MULTI_GPU", "num_processes": 8}, "ddp", 0, 8),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": {"zero_stage": 3}},
            "deepspeed",
            3,
            4,
        ),
    ],
)
def test_read_launch_file_reads_engine_and_gpus(tree: dict, engine: str, stage: int, gpus: int, tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(json.dumps(tree))
    launch = read_launch_file(path, gpu_memory=80 * GB)
    assert (launch.engine, launch.zero_stage, launch.num_gpus, launch.offload_optimizer) == (engine, stage, gpus, False)


def test_read_launch_file_reads_offload_inline_or_from_json(tmp_path: Path) -> None:
    inline = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    for number, settings in enumerate((inline, {"deepspeed_config_file": "zero3.json"})):
        path = tmp_path / f"{number}.yaml"
        path.write_text(json.dumps({"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": settings}))
        launch = read_launch_file(path, gpu_memory=80 * GB)
        assert (launch.zero_stage, launch.offload_optimizer, launch.offload_parameters) == (3, True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("distributed_type: FSDP", "FSDP is not one of"), ("[", "not valid YAML"), ("- a", "is a mapping")],
)
def test_read_launch_file_rejects_other_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_launch_file(tmp_path / "launch.yaml", gpu_memory=80 * GB)


# The commands


@pytest.fixture
def small(model_folder: Path, tmp_path: Path) -> list[str]:
    """Command-line arguments that name a tiny recipe of stage sft."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "2 + 2 =", "answer": "4"}) + "\n")
    tree = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": str(tmp_path / "rows.jsonl"), "format": "prompt_answer"},
        "sft": {"max_steps": 1, "max_length": 128, "gradient_checkpointing": False},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    return [str(tmp_path / "recipe.yaml")]


def test_train_rejects_a_run_that_does_not_fit_unless_overridden(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = namedtuple("memory", ["total"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(total=3 * 10**8))
    with pytest.raises(SystemExit) as exit:
        main(["train", *small])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "phase train needs" in message and "of 0.30 GB per process" in message and "--skip-memory-check" in message
    assert not (tmp_path / "run").exists()
    main(["train", *small, "--skip-memory-check"])
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1").is_dir()


def test_plan_prints_the_phases_and_exits_1_if_they_do_not_fit(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as fits:
        main(["plan", *small, "--gpus", "1"])
    assert fits.value.code == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("load", "train", "update", "save", "activations", "fits: phase"))
    recipe = str(ROOT / "recipes/reka-flash-3/sft-full.yaml")
    with pytest.raises(SystemExit) as does_not:
        main(["plan", recipe, "--gpus", "8"])
    assert does_not.value.code == 1
    output = capsys.readouterr().out
    assert "does not fit: phase train" in output and "launch with ZeRO-3" in output


def test_compare_has_a_line_per_method_and_engine(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *small, "--compare"])
    output = capsys.readouterr().out
    assert "GB (10^9 bytes) per GPU" in output and "GPUs of 80 GB, 8 per node" in output and "does not fit" in output
    lines = [line.split()[:3] for line in output.splitlines() if line.startswith(("sft", "rloo"))]
    # Three methods with six engines, except QLoRA with the three of ZeRO-3, which would shard the quantized base.
    assert len(lines) == 2 * (3 * 6 - 3)
    assert {engine.strip(",") for _, method, engine in lines if method == "QLoRA"} == {"ZeRO-0", "ZeRO-1", "ZeRO-2"}


def test_make_plan_checks_host_memory() -> None:
    launch = replace(zero(3, offload_optimizer=True), host_memory=128 * GB)
    plan = make_plan(in_process("rloo-full"), launch)
    assert {phase.name for phase in plan.overfull} >= {"train", "update"}
    assert plan.phases[3].host["optimizer"] == pytest.approx(16 * 20_905_482_240)
