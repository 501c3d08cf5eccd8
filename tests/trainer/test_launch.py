"""The launch files ask for what they say; what Accelerate would silently turn into something else is refused."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
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
from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.launch import Launch, check_engine, read_launch
from rekatrain.trainer.models import check_trainable
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.trl_run import make_config
from ruamel.yaml import YAML
from trl.trainer.sft_config import SFTConfig

FILES = Path(__file__).parents[2] / "recipes" / "accelerate"
ASKED = {
    "single": Launch(engine="single", zero_stage=None, num_processes=1),
    "ddp": Launch(engine="ddp", zero_stage=None, num_processes=8),
    "zero1": Launch(engine="deepspeed", zero_stage=1, num_processes=8),
    "zero2": Launch(engine="deepspeed", zero_stage=2, num_processes=8),
    "zero3": Launch(engine="deepspeed", zero_stage=3, num_processes=8),
    "zero3-offload": Launch(engine="deepspeed", zero_stage=3, num_processes=8),
    "two-nodes": Launch(engine="deepspeed", zero_stage=3, num_processes=16),
}
SINGLE = str(FILES / "single.yaml")
LaunchIt = Callable[..., None]


@pytest.fixture
def launch_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LaunchIt:
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


@pytest.mark.parametrize("name", ASKED)
def test_a_launch_file_asks_for_what_it_says_from_any_folder(name: str, launch_it: LaunchIt) -> None:
    where = ["--main_process_ip", "10.0.0.1", "--main_process_port", "29400"] if name == "two-nodes" else []
    launch_it("--config_file", str(FILES / f"{name}.yaml"), *where)
    assert read_launch() == ASKED[name]
    assert ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE" in os.environ) == (name == "zero3-offload")
    if ASKED[name].engine == "deepspeed" and not torch.cuda.is_available():  # compiling it takes minutes
        assert not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    if ASKED[name].zero_stage == 3:  # nobody holds the whole model, and a checkpoint is one that transformers loads
        assert os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
        assert os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def test_launch_files_name_no_machine_and_no_other_file() -> None:
    found = {path.stem: YAML(typ="safe").load(path) for path in FILES.iterdir()}
    assert found.keys() == ASKED.keys()
    for content in found.values():
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
def test_what_would_silently_become_something_else_is_refused(
    arguments: list[str], message: str, launch_it: LaunchIt
) -> None:
    launch_it(*arguments)
    with pytest.raises(InputError, match=message):
        read_launch()


@pytest.mark.parametrize("asked", [ASKED["zero3"], ASKED["ddp"], ASKED["zero1"]])
def test_an_engine_that_is_not_the_one_asked_for_stops_the_run(asked: Launch) -> None:
    accelerator = Accelerator(cpu=True)
    check_engine(ASKED["single"], accelerator)
    with pytest.raises(InputError, match=f"asked for {asked}, but there is single in 1 process:"):
        check_engine(asked, accelerator)


@pytest.mark.parametrize(
    ("option", "key"),
    [("--gradient_clipping", "max_grad_norm"), ("--gradient_accumulation_steps", "gradient_accumulation_steps")],
)
def test_a_launch_file_that_contradicts_the_recipe_is_refused(option: str, key: str, launch_it: LaunchIt) -> None:
    recipe = Recipe(stage="sft", output_dir="run", model={}, dataset={})
    launch_it("--use_deepspeed", "--zero_stage", "1", "--num_processes", "1", option, "7")
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
def test_bfloat16_weights_are_trained_where_float32_copies_of_them_are(
    dtype: str, lora: dict | None, is_deepspeed: bool, bf16: bool, message: str | None, model_folder: Path
) -> None:
    model = {"pretrained_model_name_or_path": str(model_folder), "dtype": dtype}
    recipe = Recipe(stage="sft", output_dir="run", model=model, lora=lora, dataset={})
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_trainable(recipe, is_deepspeed=is_deepspeed, bf16=bf16)


def test_a_checkpoint_of_another_launch_or_cut_off_is_not_resumed_from(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "1 + 1 =", "answer": 2}\n')
    recipe = {
        "stage": "sft",
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": "rows.jsonl", "format": "prompt_answer"},
        "sft": {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    main(["train", "recipe.yaml"])
    (saved,) = Path("run").glob("checkpoints/*/launch.json")
    assert Launch(**json.loads(saved.read_text())) == ASKED["single"]
    saved.write_text(json.dumps(asdict(ASKED["zero3"])))
    for message in ("deepspeed ZeRO-3 in 8 processes, and this is single in 1 process", "was cut off while it was"):
        with pytest.raises(SystemExit):
            main(["train", "recipe.yaml", "--resume", "sft.max_steps=2"])
        assert message in capsys.readouterr().err
        saved.unlink(missing_ok=True)
