"""Launch files are read as they are written, and settings that Accelerate would replace in silence are errors."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from ruamel.yaml import YAML
from trl.trainer.sft_config import SFTConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.models.load import check_trainable
from rekatrain.trainer.processes.launch import (
    Launch,
    check_engine,
    check_mixed_precision,
    prepare_deepspeed,
    read_launch,
    read_sequence_parallel,
)
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.trl_stages.run import make_config
from tests.end_to_end.small_runs import rloo_recipe, write_data, write_recipe

FILES = Path(__file__).parents[3] / "recipes" / "accelerate"
LAUNCHES = {
    "single": Launch(engine="single", zero_stage=None, num_processes=1),
    "ddp": Launch(engine="ddp", zero_stage=None, num_processes=8),
    "ddp-ulysses": Launch(engine="ddp", zero_stage=None, num_processes=8),
    "zero1": Launch(engine="deepspeed", zero_stage=1, num_processes=8),
    "zero2": Launch(engine="deepspeed", zero_stage=2, num_processes=8),
    "zero3": Launch(engine="deepspeed", zero_stage=3, num_processes=8),
    "zero3-offload": Launch(engine="deepspeed", zero_stage=3, num_processes=8),
    "two-nodes": Launch(engine="deepspeed", zero_stage=3, num_processes=16),
}
SINGLE = str(FILES / "single.yaml")
SetLaunch = Callable[..., None]


@pytest.fixture
def set_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SetLaunch:
    """Give this process the environment that `accelerate launch ARGUMENTS` gives to those it starts."""

    def set_environment(*arguments: str) -> None:
        parsed = launch_command_parser().parse_args([*arguments, "-m", "rekatrain"])
        args, defaults, _ = _validate_launch_command(parsed)
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config) if defaults else ""
        # As accelerate's launch_command chooses.
        if args.use_deepspeed and not args.cpu:
            environment = prepare_deepspeed_cmd_env(args)[1]
        elif (args.use_fsdp or args.multi_gpu) and not args.cpu:
            environment = prepare_multi_gpu_env(args)
        else:
            environment = prepare_simple_launcher_cmd_env(args)[1]
        if hasattr(args, "nproc_per_node"):  # torchrun's part
            environment["WORLD_SIZE"] = str(int(args.nproc_per_node) * int(getattr(args, "nnodes", 1)))
        for name in ("MASTER_ADDR", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            if value != os.environ.get(name):
                monkeypatch.setenv(name, value)

    monkeypatch.chdir(tmp_path)
    return set_environment


@pytest.mark.parametrize("name", LAUNCHES)
def test_read_launch_reads_each_launch_file_from_any_folder(name: str, set_launch: SetLaunch) -> None:
    where = ["--main_process_ip", "10.0.0.1", "--main_process_port", "29400"] if name == "two-nodes" else []
    set_launch("--config_file", str(FILES / f"{name}.yaml"), *where)
    assert read_launch() == LAUNCHES[name]
    assert read_sequence_parallel() == (4 if name == "ddp-ulysses" else 1)
    prepare_deepspeed(read_launch())
    assert ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE" in os.environ) == (name == "zero3-offload")
    if LAUNCHES[name].engine == "deepspeed" and not torch.cuda.is_available():  # compiling it takes minutes
        assert not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    if LAUNCHES[name].zero_stage == 3:  # no process holds the whole model, and transformers can load the checkpoint
        assert os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
        assert os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("precision", [{"bf16": True}, {"bf16": False}, {"bf16": False, "fp16": True}])
def test_launch_files_leave_the_arithmetic_to_the_recipe(name: str, precision: dict, set_launch: SetLaunch) -> None:
    where = ["--main_process_ip", "10.0.0.1", "--main_process_port", "29400"] if name == "two-nodes" else []
    set_launch("--config_file", str(FILES / f"{name}.yaml"), *where)
    check_mixed_precision("sft", **precision)


@pytest.mark.parametrize("name", ["single", "ddp", "zero3"])
@pytest.mark.parametrize(
    ("launched", "precision", "message"),
    [
        ("bf16", {"bf16": True}, None),
        ("fp16", {"bf16": False, "fp16": True}, None),
        ("bf16", {"bf16": False}, "mixed_precision bf16, but the recipe has sft.bf16 false"),
        ("fp16", {"bf16": False}, "mixed_precision fp16, but the recipe has sft.bf16 false"),
        ("fp16", {"bf16": True}, "mixed_precision fp16, but the recipe has sft.bf16 true"),
        ("bf16", {"bf16": False, "fp16": True}, "mixed_precision bf16, but the recipe has sft.fp16 true"),
    ],
)
def test_check_mixed_precision_rejects_another_than_the_recipe(
    name: str, launched: str, precision: dict, message: str | None, set_launch: SetLaunch
) -> None:
    set_launch("--config_file", str(FILES / f"{name}.yaml"), "--mixed_precision", launched)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_mixed_precision("sft", **precision)


@pytest.mark.parametrize(
    ("config", "bf16", "message"),
    [
        ({}, True, None),
        ({"bf16": {"enabled": "auto"}}, False, None),
        ({"bf16": {"enabled": True}}, True, None),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, True, None),
        ({"fp16": {"enabled": False}}, False, None),
        ({"bf16": {"enabled": True}}, False, "bf16.enabled true, but the recipe has rloo.bf16 false"),
        ({"bf16": {"enabled": False}}, True, "bf16.enabled false, but the recipe has rloo.bf16 true"),
        ({"fp16": {"enabled": True}}, True, "fp16.enabled true, but the recipe has rloo.bf16 true"),
    ],
)
def test_check_mixed_precision_reads_a_deepspeed_json(
    config: dict, bf16: bool, message: str | None, set_launch: SetLaunch
) -> None:
    Path("zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **config}))
    set_launch("--use_deepspeed", "--deepspeed_config_file", "zero.json", "--num_processes", "2")
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_mixed_precision("rloo", bf16=bf16)


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"optimizer": {"type": "AdamW"}}', "zero.json has a section optimizer, and the recipe decides it"),
        ('{"scheduler": {"type": "WarmupLR"}}', "zero.json has a section scheduler, and the recipe decides it"),
        ("{", "zero.json is not valid JSON"),
        ("[]", "zero.json holds a list"),
    ],
)
def test_every_stage_rejects_a_deepspeed_json(
    stage: str,
    content: str,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    set_launch: SetLaunch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path)
    Path("zero.json").write_text("{}")
    set_launch("--use_deepspeed", "--deepspeed_config_file", "zero.json", "--num_processes", "1")
    Path("zero.json").write_text(content)
    if stage == "rloo":
        path = rloo_recipe(tmp_path, "run", model_folder)
    else:
        dataset = {"path": f"{stage}.jsonl", "format": "preference" if stage == "reward" else "prompt_answer"}
        path = write_recipe(tmp_path, "run", model_folder, stage=stage, dataset=dataset, **{stage: {"max_steps": 1}})
    capsys.readouterr()
    for options in ((), ("--dry-run",)):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(path), *options])
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.count("\n") == 1 and f"error: {message}" in line


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
def test_every_stage_rejects_the_mixed_precision_of_a_launch(
    stage: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for load in ("sft.load_policy", "reward_model.train.load_reward_model", "rloo.train.load_policy"):
        monkeypatch.setattr(f"rekatrain.trainer.{load}", None)  # no weight is loaded
    dataset = {"path": f"{stage}.jsonl", "format": "preference" if stage == "reward" else "prompt_answer"}
    if stage == "rloo":
        path = rloo_recipe(tmp_path, "run", model_folder)
    else:
        path = write_recipe(tmp_path, "run", model_folder, stage=stage, dataset=dataset, **{stage: {"max_steps": 1}})
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path)])
    assert ended.value.code == 2
    assert f"has mixed_precision bf16, but the recipe has {stage}.bf16 false" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_launch_files_name_no_machine_and_no_other_file() -> None:
    launch_files = {path.stem: YAML(typ="safe").load(path) for path in FILES.iterdir()}
    assert launch_files.keys() == LAUNCHES.keys()
    for content in launch_files.values():
        keys = content.keys() | content.get("deepspeed_config", {}).keys()
        assert not keys & {"main_process_ip", "machine_rank", "deepspeed_config_file", "deepspeed_hostfile", "gpu_ids"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpu", "--num_processes", "2"], "started one process"),
        # A stage without --use_deepspeed is as if it were not there.
        (["--config_file", SINGLE, "--num_processes", "2", "--zero_stage", "3"], "started one process"),
        (["--config_file", str(FILES / "zero3.yaml"), "--cpu"], "started one process"),
        (["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"], "FSDP"),
        (["--use_deepspeed", "--zero_stage", "0", "--num_processes", "2"], "ddp.yaml"),
    ],
)
def test_read_launch_rejects_settings_replaced_in_silence(
    arguments: list[str], message: str, set_launch: SetLaunch
) -> None:
    set_launch(*arguments)
    with pytest.raises(InputError, match=message):
        read_launch()


@pytest.mark.parametrize("launch", [LAUNCHES["zero3"], LAUNCHES["ddp"], LAUNCHES["zero1"]])
def test_check_engine_rejects_another_engine(launch: Launch) -> None:
    accelerator = Accelerator(cpu=True)
    check_engine(LAUNCHES["single"], accelerator)
    with pytest.raises(InputError, match=f"settings are {launch}, but accelerate runs single in 1 process:"):
        check_engine(launch, accelerator)


@pytest.mark.parametrize(
    ("option", "key"),
    [("--gradient_clipping", "max_grad_norm"), ("--gradient_accumulation_steps", "gradient_accumulation_steps")],
)
def test_make_config_rejects_a_contradicting_launch_file(option: str, key: str, set_launch: SetLaunch) -> None:
    recipe = Recipe(stage="sft", output_dir="run", model={}, dataset={})
    set_launch("--use_deepspeed", "--zero_stage", "1", "--num_processes", "1", option, "7")
    assert make_config("sft", {key: 7}, recipe, SFTConfig).deepspeed_plugin is not None
    with pytest.raises(InputError, match=f"the launch file has {option[2:]} 7.*, the recipe's sft section 3"):
        make_config("sft", {key: 3}, recipe, SFTConfig)


@pytest.mark.parametrize(
    ("dtype", "lora", "is_deepspeed", "bf16", "message"),
    [
        ("bfloat16", None, True, True, None),
        ("bfloat16", None, True, False, "set sft.bf16: true"),
        ("bfloat16", {"r": 2}, True, False, "set sft.bf16: true"),
        ("bfloat16", {"r": 2}, False, False, None),
        ("bfloat16", None, False, True, "rounds small updates away"),
        ("float32", None, True, False, None),
        ("float32", None, False, True, None),
    ],
)
def test_check_trainable_wants_float32_copies_of_bfloat16(
    dtype: str, lora: dict | None, is_deepspeed: bool, bf16: bool, message: str | None, model_folder: Path
) -> None:
    model = {"pretrained_model_name_or_path": str(model_folder), "dtype": dtype}
    recipe = Recipe(stage="sft", output_dir="run", model=model, lora=lora, dataset={})
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_trainable(recipe, is_deepspeed=is_deepspeed, bf16=bf16)
