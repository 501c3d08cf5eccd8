"""Each cell of the table of adapters in trainer/export/README.md: it works, or one line refuses it before weights."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.export.folders import write_merged
from rekatrain.trainer.export.gguf_model import write_gguf
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.export.probe import probe_logprobs
from rekatrain.trainer.export.verify_gguf import kl_divergence, next_logprobs, start_server
from rekatrain.trainer.models.load import add_adapter
from rekatrain.trainer.models.lora_targets import check_quantized_targets
from rekatrain.trainer.models.probe import compare, read_probe, run_probe
from rekatrain.trainer.models.quantization import check_quantization, make_quantization
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.recipe.load import load_recipe
from tests.helpers.adapters import METHODS, load_with_one_scale
from tests.helpers.exports import servable_llama, write_sft_recipe

README = Path(__file__).parents[3] / "trainer" / "export" / "README.md"
COLUMNS = ["train", "resume", "merge", "PEFT", "vLLM", "GGUF", "QLoRA", "reward"]
LIMIT = 1e-3  # nats, float32


def read_table() -> dict[str, dict[str, bool]]:
    """Return the table: method -> column -> True where the cell is a yes."""
    lines = README.read_text(encoding="utf-8").split("| adapter |")[1].splitlines()
    assert [cell.strip() for cell in lines[0].strip(" |").split("|")] == COLUMNS
    table = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert all(cell in ("yes", "no") for cell in cells), line
        table[re.sub("`", "", method)] = {name: cell == "yes" for name, cell in zip(COLUMNS, cells, strict=True)}
    return table


TABLE = read_table()
QUICK = ("plain LoRA", "DoRA", "modules_to_save: a head that is tied")
TRAINED = [method for method, cells in TABLE.items() if cells["train"]]


def write_recipe(folder: Path, tokenizer: PreTrainedTokenizerFast, method: str, **changes: Any) -> Path:
    """Write the method's recipe of three steps, with its model in `folder`; return the recipe's path."""
    is_tied, lora = METHODS[method]
    path = write_sft_recipe(folder, tokenizer)
    servable_llama(tokenizer, tie_word_embeddings=is_tied).save_pretrained(folder / "model")
    sft = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    recipe = json.loads(path.read_text()) | {"lora": lora, "sft": sft | {"lr_scheduler_type": "constant"}}
    path.write_text(json.dumps(recipe | changes))
    return path


def test_table_has_every_method() -> None:
    assert set(TABLE) == set(METHODS)
    for cells in TABLE.values():  # what is not trained cannot be exported
        assert cells["train"] or not any(cells[column] for column in COLUMNS if column != "reward")


@pytest.fixture(
    scope="module",
    params=[pytest.param(method, marks=() if method in QUICK else pytest.mark.slow) for method in TRAINED],
)
def trained(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A method, and a folder with its run of three steps; read only."""
    folder = tmp_path_factory.mktemp("adapter")
    main(["train", str(write_recipe(folder, tokenizer, request.param))])
    return request.param, folder


def distance(folder: Path, model: torch.nn.Module) -> float:
    """Return the largest difference of a log-probability from those of the training process, in nats."""
    probe = read_probe(folder / "run" / "checkpoints" / "checkpoint-3")
    assert probe is not None
    return compare(probe, run_probe(model.eval(), [ids.tolist() for ids in probe.ids]).logprobs)[0]


def weights_of(folder: Path) -> LazyWeights:
    return LazyWeights(find_source(str(folder / "run")))


def test_resumed_adapter_is_the_unbroken_one(trained: tuple[str, Path], tmp_path: Path) -> None:
    method, folder = trained
    assert TABLE[method]["resume"]
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    main(["train", str(folder / "recipe.yaml"), "--resume", f"output_dir={tmp_path / 'run'}"])
    name = "checkpoints/checkpoint-3/adapter_model.safetensors"
    unbroken, resumed = load_file(folder / "run" / name), load_file(tmp_path / "run" / name)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_merged_adapter_is_pefts_and_trainings(trained: tuple[str, Path], tmp_path: Path, tokenizer) -> None:
    method, folder = trained
    assert TABLE[method]["merge"]
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert distance(folder, base) > 0.1  # training has changed it
    expected = PeftModel.from_pretrained(base, str(folder / "run" / "checkpoints" / "checkpoint-3")).merge_and_unload()
    weights = weights_of(folder)
    write_merged(tmp_path / "out", weights, tokenizer, max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    assert distance(folder, merged) < LIMIT


def test_exported_adapter_is_loaded_by_peft_and_vllm(trained: tuple[str, Path], tmp_path: Path) -> None:
    method, folder = trained
    assert TABLE[method]["PEFT"]
    main(["export", str(folder / "run"), str(tmp_path / "out"), "--as", "adapter"])
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert distance(folder, PeftModel.from_pretrained(base, str(tmp_path / "out"))) < LIMIT
    assert (tmp_path / "out" / "serving" / "vllm.sh").exists() == TABLE[method]["vLLM"]
    if TABLE[method]["vLLM"]:  # its arithmetic; tests/vllm/test_adapters.py has the real one
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert distance(folder, load_with_one_scale(tmp_path / "out", base)) < LIMIT


def test_gguf_is_the_trained_model(trained: tuple[str, Path], tmp_path: Path, tokenizer, monkeypatch) -> None:
    method, folder = trained
    assert TABLE[method]["GGUF"]
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")  # all tests share the tokenizer
    file = tmp_path / "model.gguf"
    write_gguf(file, weights_of(folder), tokenizer, file_type="f32", name="tiny", intermediate_size=96)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, str(folder / "run" / "checkpoints" / "checkpoint-3")).eval()
    ids = tokenizer.encode("human: 3 + 3 = <sep> assistant:")
    expected = probe_logprobs(model, torch.tensor([ids]))
    server = start_server(file, n_ctx=64)
    kls = []
    for end in range(len(ids) - 6, len(ids) + 1):
        logprobs = next_logprobs(server.listening_address, ids[:end], expected.shape[1])
        if logprobs is not None:
            kls.append(kl_divergence(expected[end - 1], logprobs))
    assert len(kls) > 2 and max(map(abs, kls)) < 1e-8


@pytest.mark.parametrize("method", [method for method, cells in TABLE.items() if not cells["train"]])
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_adapter_that_is_not_trained_is_refused(
    tmp_path: Path, tokenizer, no_weights: None, capsys: pytest.CaptureFixture[str], method: str, stage: str
) -> None:
    changes: dict[str, Any] = {"stage": stage}
    if stage == "rloo":
        changes |= {"rloo": {"max_steps": 1}, "rewards": {"reasoning_format": None}, "sft": {}}
    path = write_recipe(tmp_path, tokenizer, method, **changes)
    assert re.match(
        r"rekatrain: error: lora\.(init_lora_weights|target_modules|target_parameters) ",
        refusal(capsys, "train", str(path)),
    )


@pytest.mark.parametrize("method", [method for method in TRAINED if not TABLE[method]["vLLM"]])
def test_adapter_that_vllm_lacks_is_refused_for_rollouts(
    tmp_path: Path, tokenizer, no_weights: None, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    rloo = {"max_steps": 1, "vllm_server_base_url": "http://127.0.0.1:9"}
    changes = {"stage": "rloo", "rloo": rloo, "rewards": {"reasoning_format": None}, "sft": {}}
    path = write_recipe(tmp_path, tokenizer, method, **changes)
    assert "is not supported for rollouts by vLLM" in refusal(capsys, "train", str(path))


@pytest.mark.parametrize("method", TRAINED)
def test_qlora_trains_the_adapter_or_refuses_it(tmp_path: Path, tokenizer, method: str) -> None:
    section = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = {"pretrained_model_name_or_path": str(tmp_path / "model"), "quantization_config": section}
    recipe = load_recipe(write_recipe(tmp_path, tokenizer, method, model=model))
    if TABLE[method]["QLoRA"]:
        check_quantization(recipe, has_gpu=True, zero_stage=None)
        config = make_quantization(section, "bfloat16")
        assert config is not None and config.load_in_4bit
    else:
        with pytest.raises(InputError, match=r"model\.quantization_config .* lora\."):
            check_quantization(recipe, has_gpu=True, zero_stage=None)


@pytest.mark.parametrize(("name", "is_packed"), [("down_proj", True), ("lm_head", False), ("norm", False)])
def test_qlora_refuses_to_save_packed_modules(tokenizer, name: str, is_packed: bool) -> None:
    adapted = add_adapter(servable_llama(tokenizer), {"r": 2, "target_modules": ["q_proj"], "modules_to_save": [name]})
    if is_packed:
        with pytest.raises(InputError, match=r"lora\.modules_to_save includes model\.layers\.0\.mlp\.down_proj"):
            check_quantized_targets(adapted)
    else:
        check_quantized_targets(adapted)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1, line
    return line
