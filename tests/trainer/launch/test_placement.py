"""Placements on nodes with GPUs that are not here: by the section, and where it is silent by the plan."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rekatrain import RECIPES
from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.commands import trainer_commands
from rekatrain.trainer.launch.hosts import Host
from rekatrain.trainer.launch.nodes import Node, Placement, find_launch_file
from rekatrain.trainer.launch.placement import place
from rekatrain.trainer.launch.section import LaunchConfig
from rekatrain.trainer.recipe.load import Recipe

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
GB = 1e9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers of Reka Flash 3: 2.1 billion parameters, 4.2 GB in bfloat16."""
    folder = tmp_path_factory.mktemp("two-layers")
    config = json.loads((RECIPES / "reka-flash-3" / "configs" / "reka-flash-3.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return str(folder)


def recipe(model: str, lora: dict | None = LORA, stage: str = "rloo", **rloo: Any) -> Recipe:
    settings = {"max_steps": 4, "prompts_per_step": 64, "max_completion_length": 1024, "micro_batch_tokens": 2048}
    sections: dict[str, Any] = {"rloo": settings | {"beta": 0.0} | rloo} if stage == "rloo" else {}
    if stage == "sft":
        sections = {"sft": {"max_steps": 4, "per_device_train_batch_size": 1, "max_length": 1024}}
    return Recipe(
        stage=stage,  # type: ignore[arg-type]  # a stage
        output_dir="runs/x",
        model={"pretrained_model_name_or_path": model, "dtype": "bfloat16"},
        dataset={"path": "rows.jsonl"},
        lora=lora,
        **sections,
    )


def placed(
    recipe: Recipe, gpus: int = 8, gb: float = 80, nodes: int = 1, has_vllm: bool = True, **section: Any
) -> Placement:
    node = Node(num_gpus=gpus, gpu_memory=gb * GB, num_nodes=nodes)
    return place(recipe, LaunchConfig(**section), node, has_vllm=has_vllm)


def assert_split(placement: Placement, gpus: int, prompts: int = 64, nodes: int = 1) -> None:
    serving = [gpu for server in placement.server_gpus for gpu in server]
    used = [*serving, *placement.trainer_gpus]
    assert placement.kind == "split" and serving and placement.trainer_gpus
    assert len(used) == len(set(used)) and set(used) <= set(range(gpus))
    assert placement.num_processes == len(placement.trainer_gpus) and prompts % (placement.num_processes * nodes) == 0


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_rloo_is_split_between_servers_and_trainers(model: str, gpus: int) -> None:
    placement = placed(recipe(model), gpus)
    assert_split(placement, gpus)
    assert placement.launch_file.name == ("single.yaml" if placement.num_processes == 1 else "ddp.yaml")


def test_full_fine_tuning_is_sharded_where_copies_do_not_fit(model: str) -> None:
    assert placed(recipe(model, None), 8, 24).launch_file.name.startswith("zero")
    assert placed(recipe(model, None), 8, 100).launch_file.name == "ddp.yaml"


def test_section_decides_over_the_plan(model: str) -> None:
    placement = placed(recipe(model), 8, servers=1, tensor_parallel_size=4, num_processes=2, config_file="zero2.yaml")
    assert_split(placement, 8)
    assert [len(server) for server in placement.server_gpus] == [4] and placement.num_processes == 2
    assert placement.launch_file.name == "zero2.yaml" and "2 GPU(s) idle" in placement.reason


def test_prompts_are_divisible_over_all_nodes(model: str) -> None:
    assert_split(placed(recipe(model, prompts_per_step=12), 8, nodes=2), 8, prompts=12, nodes=2)


def test_shared_divides_the_memory(model: str) -> None:
    for lora in (LORA, None):
        placement = placed(recipe(model, lora), 4, 24, placement="shared")
        assert placement.kind == "shared" and placement.launch_file.name == "zero3.yaml"
        assert [list(server) for server in placement.server_gpus] == [[0, 1, 2, 3]] == [[*placement.trainer_gpus]]
        assert placement.num_processes == 4 and placement.gpu_memory_utilization is not None
        assert 0.3 < placement.gpu_memory_utilization <= 0.9
    # All weights: their states, 16 bytes of each of 2.1 billion on 4 GPUs, stay while the server samples.
    assert placement.gpu_memory_utilization < 1 - 16 * 2.1 / 4 / 24


def test_shared_is_chosen_where_no_split_is_possible(model: str) -> None:
    assert placed(recipe(model), 1).kind == "shared"
    assert placed(recipe(model, prompts_per_step=64), 8, 80, placement="shared").kind == "shared"


@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_without_servers_every_gpu_trains(model: str, stage: str) -> None:
    placement = placed(recipe(model, stage=stage), 4, has_vllm=False)
    assert (placement.kind, placement.server_gpus, placement.num_processes) == ("in_process", (), 4)
    urls = {"vllm_server_base_url": "http://elsewhere:8000"}
    assert placed(recipe(model, **urls), 4).kind == "in_process"
    assert placed(recipe(model, stage="sft"), 1).launch_file.name == "single.yaml"


def test_cpu_has_one_server_and_one_trainer(model: str) -> None:
    placement = placed(recipe(model), 0)
    assert (placement.server_gpus, placement.num_processes, placement.launch_file.name) == ([[]], 1, "single.yaml")
    # 64 x 8 completions of 1,280 tokens, 2 layers with keys and values of 8 heads of 96 in float32
    assert placement.cpu_cache == -(-64 * 8 * 1280 * 2 * 2 * 8 * 96 * 4 // 2**30)
    placement = placed(recipe(model), 0, servers=2, num_processes=2)
    assert (len(placement.server_gpus), placement.num_processes, placement.launch_file.name) == (2, 2, "ddp.yaml")


@pytest.mark.parametrize(
    ("gpus", "gb", "section", "rloo", "error"),
    [
        (8, 80, {"servers": 9}, {}, "8 GPUs of a node cannot be split into servers of 1 GPU.* with launch.servers 9"),
        (
            4,
            80,
            {"num_processes": 3},
            {},
            "number divides rloo.prompts_per_step .64. with launch.num_processes 3",
        ),
        (
            4,
            80,
            {"tensor_parallel_size": 8},
            {},
            "needs 8 GPUs .launch.tensor_parallel_size., but the run has 4",
        ),
        (8, 80, {"tensor_parallel_size": 3}, {}, "cannot divide the model's 64 attention heads"),
        (
            3,
            80,
            {"placement": "shared"},
            {"prompts_per_step": 6},
            "server of 3 GPUs cannot divide .* set launch.gpus",
        ),
        (4, 80, {"placement": "shared"}, {"prompts_per_step": 6}, "cannot be divided evenly among 4 processes"),
        (4, 80, {"placement": "shared", "num_processes": 2}, {}, "with placement shared all 4 GPUs serve and train"),
        (4, 80, {"placement": "shared", "gpu_memory_utilization": 0.05}, {}, "has no room for one completion"),
        (1, 80, {"placement": "split"}, {}, "1 GPU of a node cannot be split"),
        (2, 6, {"placement": "split"}, {}, "a server needs 4 GPUs, but the run has 2 on a node"),
        (2, 80, {"placement": "in_process", "num_processes": 4}, {}, "num_processes is 4, but a node has 2 GPUs"),
        (2, 80, {"config_file": "zero9.yaml"}, {}, "launch.config_file is 'zero9.yaml': there is no such file"),
        (4, 80, {"placement": "in_process", "config_file": "single.yaml"}, {}, "distributed_type NO with 4 processes"),
        (0, 80, {"placement": "shared"}, {}, "launch.placement shared divides GPUs, and there is none"),
        (0, 80, {"tensor_parallel_size": 2}, {}, "servers on a CPU have no GPU"),
        (0, 80, {"num_processes": 3}, {}, "prompts_per_step .64. cannot be divided evenly among 3 processes"),
        (3, 80, {"placement": "in_process"}, {}, "prompts_per_step .64. cannot be divided evenly among 3 processes"),
    ],
)
def test_impossible_placement_is_one_error(
    model: str, gpus: int, gb: float, section: dict, rloo: dict, error: str
) -> None:
    with pytest.raises(InputError, match=error) as caught:
        placed(recipe(model, **rloo), gpus, gb, **section)
    assert "\n" not in str(caught.value)


def test_memory_check_can_be_left_out(model: str) -> None:
    node = Node(num_gpus=2, gpu_memory=6 * GB)
    config = LaunchConfig(placement="split", tensor_parallel_size=1)
    assert place(recipe(model), config, node, has_vllm=True, ignores_memory=True).kind == "split"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('distributed_type: "NO"\nnum_processes: 1', "distributed_type NO with 2 processes would train the same model"),
        ("distributed_type: FSDP\nnum_processes: 2", "distributed_type FSDP is not one of"),
        ("stage: rloo", "is no launch file: it has no distributed_type and no num_processes"),
        ("[", "mine.yaml"),
    ],
)
@pytest.mark.parametrize("gpus", [0, 2])
def test_wrong_launch_file_is_one_error(model: str, tmp_path: Path, text: str, error: str, gpus: int) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        placed(recipe(model, stage="sft"), gpus, num_processes=2, config_file=str(file))
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_launch_file_of_several_nodes_starts_one_on_one_machine() -> None:
    placement = Placement(kind="in_process", launch_file=find_launch_file("two-nodes.yaml"))
    (command,) = trainer_commands(["recipe.yaml"], LaunchConfig(), placement, [Host(address="127.0.0.1")])
    options = dict(pairwise(command.argv))
    assert (options["--num_machines"], options["--num_processes"]) == ("1", "1")


def test_launch_file_of_the_user_is_found(model: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((RECIPES / "accelerate" / "zero2.yaml").read_text())
    assert placed(recipe(model, stage="sft"), 2, config_file=str(file)).launch_file == file
