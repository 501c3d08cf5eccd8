"""Models that are loaded at once, in several threads of one process."""

import threading
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from rekatrain.trainer.models.load import load_model
from tests.conftest import tiny_llama


def test_loads_at_once_leave_embeddings_tied(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path)
    tie_weights = PreTrainedModel.tie_weights
    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie_weights)  # restored, whatever happens here
    loaded, start = [], threading.Barrier(8)

    def load() -> None:
        start.wait()
        loaded.append(load_model(str(tmp_path), dtype="float32"))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert PreTrainedModel.tie_weights is tie_weights
    assert len(loaded) == 8
    assert all(model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in loaded)
