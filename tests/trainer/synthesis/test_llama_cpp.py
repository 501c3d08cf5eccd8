"""`rekatrain generate` against a real llama.cpp server, in both formats of requests."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.trainer import api
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.models.source import find_source
from tests.conftest import write_jsonl
from tests.helpers.exports import servable_llama

TEMPLATE = Path(__file__).parents[3] / "data" / "chat_template.jinja"


@pytest.fixture
def llama_server(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of a random model, whose folder `model` is in the folder where the test works."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, of the extra `test`")
    from rekatrain.trainer.export.gguf_model import write_gguf
    from rekatrain.trainer.export.verify_gguf import start_server

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.read_text())
    servable_llama(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    weights = LazyWeights(find_source("model"))
    write_gguf(Path("model.gguf"), weights, tokenizer, file_type="f32", name="tiny", intermediate_size=96)
    server = start_server(Path("model.gguf"), n_ctx=512, num_slots=2)
    yield f"{server.listening_address}/v1"
    del server


@pytest.mark.slow
def test_generate_reads_a_real_llama_cpp_server(llama_server: str, tokenizer: PreTrainedTokenizerFast) -> None:
    write_jsonl(Path("prompts.jsonl"), *({"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(4)))
    for format in ("reka", "chat"):
        recipe = {
            "stage": "sft",
            "output_dir": "unused",
            "model": {"pretrained_model_name_or_path": "model", "dtype": "float32"},
            "dataset": {"path": "prompts.jsonl", "format": "prompt_answer"},
            "rewards": {"reasoning_format": None},
            "generate": {
                "out": format,
                "num_generations": 3,
                "max_completion_length": 12,
                "keep": "all",
                "server": {"base_url": llama_server, "model": "any", "format": format, "concurrency": 2},
            },
        }
        Path("generate.yaml").write_text(json.dumps(recipe))
        api.generate("generate.yaml")
        answers = [json.loads(line) for line in Path(format, "answers.jsonl").read_text().splitlines()]
        assert len({(answer["prompt"], answer["index"]) for answer in answers}) == 12
        for answer in answers:
            assert answer["prompt_tokens"] > 5 and 1 <= answer["completion_tokens"] <= 12
            if answer["finish_reason"] == "length":
                assert "<sep>" not in answer["text"]
        # the draws of a prompt differ, as their seeds do
        assert Counter(answer["text"] for answer in answers).most_common(1)[0][1] < 12
        if format == "reka":  # the server has encoded nothing: it got the ids
            lengths = {len(encode_text(f"human: {n} + {n} = <sep> assistant:", tokenizer)) for n in range(4)}
            assert {answer["prompt_tokens"] for answer in answers} == lengths
