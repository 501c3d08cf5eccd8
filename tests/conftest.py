"""Fixtures of many tests: a tiny tokenizer and Llama, Reka's real tokenizer, and the folders of vendored data."""

import atexit
import json
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

# Set before transformers is imported: no test sends a request to the hub, even where there is a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Encoded rows lie in the cache of `datasets`: none of the tests touches the home folder's.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rekatrain-tests-")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.json_servers import JsonServer, json_servers

GOLDEN = Path(__file__).parent / "data" / "golden"
REAL_DATA = Path(__file__).parent / "data" / "real"

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

CORPUS = [
    "human: What is 2+2? <sep> assistant: <reasoning>\nTwo and two make four.\n</reasoning>\n\n4 <sep>",
    "human: Be brief. Name a colour. <sep> assistant: Blue, as in the sky. <sep> human: 17 + 25 =",
    "human: 17 + 25 = <sep> assistant: 42 <sep>",
]


# The tests of whole runs are the longest: with several workers they start first, so that no worker ends with one.
LONGEST_FIRST = ("vllm", "end_to_end", "package", "benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders of `LONGEST_FIRST` first; the order is otherwise that of collection."""
    items.sort(key=lambda item: not set(LONGEST_FIRST) & set(item.path.parts))


# Modules that are in no test's folder.
KEPT_MODULES: set[str] = set()


@pytest.fixture(autouse=True)
def restore_imports(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each test its own sys.path without folders of other tests, and forget the modules (my_rewards.py) of those.

    A fixture of a module or session runs before this one: what it put into sys.path is removed here too.
    """

    def forget() -> None:
        for name in sys.modules.keys() - KEPT_MODULES:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                del sys.modules[name]
            else:
                KEPT_MODULES.add(name)

    folder = f"{tmp_path_factory.getbasetemp()}{os.sep}"
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(folder)])
    forget()
    yield
    forget()


@pytest.fixture(autouse=True)
def fork_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports verified in a fork of a process that has made the imports; test_user_folder.py runs the real one."""
    from tests.helpers import forks

    monkeypatch.setattr("rekatrain.trainer.export.probe.subprocess", SimpleNamespace(run=forks.run))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 300 ids, with `<|endoftext|>` as eos and no pad token, like Reka's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer."""
    return tiny_tokenizer()


def tiny_config(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaConfig:
    """Config of a Llama with two layers and, like Reka's, more embeddings than the tokenizer has ids."""
    sizes: dict[str, object] = {
        "vocab_size": len(tokenizer) + 20,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    return LlamaConfig(**(sizes | changes))


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Random float32 Llama of `tiny_config`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(tokenizer, **changes)).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh tiny model, with equal weights in every test."""
    return tiny_llama(tokenizer)


@pytest.fixture
def ending_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The tiny model, changed to sample eos with a probability of about 0.1 per token."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.5
    return model


@pytest.fixture
def policy(ending_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The `ending_model` with exactly one embedding per id of the tokenizer."""
    ending_model.resize_token_embeddings(len(tokenizer))
    return ending_model


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its tokenizer; read only."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cl100k_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tokenizer.json` of cl100k_base, unpacked; read only."""
    file = tmp_path_factory.mktemp("cl100k") / "tokenizer.json"
    file.write_bytes(lzma.decompress((GOLDEN / "cl100k_tokenizer.json.xz").read_bytes()))
    return file


@pytest.fixture(scope="session")
def cl100k(cl100k_file: Path) -> PreTrainedTokenizerFast:
    """Reka's tokenizer: cl100k_base with eos `<|endoftext|>` and no pad token."""
    return PreTrainedTokenizerFast(tokenizer_file=str(cl100k_file), eos_token="<|endoftext|>")


@pytest.fixture(scope="session", params=["tiny", "cl100k"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, then Reka's."""
    return request.getfixturevalue({"tiny": "tokenizer", "cl100k": "cl100k"}[request.param])


def write_jsonl(path: Path, *rows: object) -> str:
    """Write one JSON value per line, and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def serve() -> Iterator[Callable[..., JsonServer]]:
    """Return a function that starts a server, which stops with the test: `serve(answer)`."""
    with json_servers() as start:
        yield start
