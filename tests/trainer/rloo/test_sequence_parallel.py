"""Tests of trainer/rloo/sequence_parallel.py: processes that split sequences compute what one process does."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.processes.launch import read_sequence_parallel
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.rloo.sequence_parallel import check_sequence_parallel
from rekatrain.trainer.rloo.setup import prepare
from tests.end_to_end.small_runs import rloo_recipe, write_data
from tests.helpers.forks import Launch, start_forked
from tests.trainer.rloo.split_sequences import SIZES, WAYS


@pytest.mark.slow
@pytest.mark.launched
def test_split_sequences_equal_whole_ones(tmp_path: Path) -> None:
    # In float64, and log-probabilities in float32. 4 processes have query heads of 2 key-value heads.
    script = str(Path(__file__).with_name("split_sequences.py"))
    process = start_forked(tmp_path, script, "out", launch=Launch(num_processes=4, file="ddp.yaml"))
    assert process.wait(300) == 0, process.output()
    ranks = [json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(4)]
    for rank in ranks:
        assert len(rank) == 2 * len(WAYS) * len(SIZES[1:])
        for result in rank.values():
            assert result["logprobs"] < 1e-6
            assert result["gradients"] < 1e-6 * result["largest"]
    for size in SIZES[1:]:
        for way, (_, completions, _) in WAYS.items():
            scored = [rank[f"{way}/{size}/1"]["scored"] for rank in ranks[:size]]
            assert sum(scored) == sum(map(sum, completions))  # each token on one process
        assert 0 in [rank[f"late/{size}/1"]["scored"] for rank in ranks]
        # Each process keeps its part of the activations.
        assert all(rank[f"long/{size}/1"]["kept"] < 1.2 / size for rank in ranks)


def test_check_sequence_parallel_names_the_sizes_that_fit() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    for size in (1, 2, 4, 12):
        check_sequence_parallel(size, 24, config)
    for size in (3, 6, 8):
        with pytest.raises(InputError, match=r"sp_size is \d, .* 12 attention heads and 4 .* can be 1 or 2 or 4 or 12"):
            check_sequence_parallel(size, 24, config)


@pytest.mark.parametrize(
    ("size", "num_processes", "message"),
    [
        (
            3,
            6,
            "4 attention heads and 2 key-value heads, which 3 processes .* 6 processes it can be 1 or 2",
        ),
        (4, 6, "6 processes cannot be divided into groups of 4: with 6 processes it can be 1 or 2"),
    ],
)
def test_run_refuses_a_size_before_weights(
    size: int,
    num_processes: int,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    no_weights: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_data(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", str(size))
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    with pytest.raises(InputError, match=message):
        prepare(load_recipe(rloo_recipe(tmp_path, "run", model_folder)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"TP": 2}, "parallelism_config_tp_size is 2, but needs FSDP"),
        ({"SP": 2, "CP": 2}, "parallelism_config_cp_size is 2, but needs FSDP"),
        ({"SP": 2, "DP_SHARD": 8}, "has 8 data-parallel processes .* but the launch has 4"),
    ],
)
def test_other_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], message: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    with pytest.raises(InputError, match=message):
        read_sequence_parallel()


def test_sequence_parallel_is_read_as_accelerate_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "4")
    assert read_sequence_parallel() == 1  # Accelerate sets the size with the switch
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read_sequence_parallel() == 4
