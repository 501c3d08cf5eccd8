"""Every form of export in the program that it is for: transformers and llama.cpp here, vLLM in tests/vllm."""

import json
import runpy
import stat
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from openai import OpenAI
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rekatrain.data.chat import STOP, parse_completion, render_prompt
from rekatrain.trainer.cli import main
from rekatrain.trainer.export.card import last_metrics
from rekatrain.trainer.export.verify_gguf import start_server
from tests.helpers.exports import ANSWER, QUESTION, ask, serve_by_llama_cpp, train_run


@pytest.fixture(scope="module")
def exports(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run and its exports as merged, adapter and gguf; read only."""
    folder = tmp_path_factory.mktemp("serving")
    run = train_run(folder, tokenizer)
    main(["export", str(run), str(folder / "merged")])
    main(["export", str(run), str(folder / "adapter"), "--as", "adapter"])
    main(["export", str(run), str(folder / "gguf"), "--as", "gguf", "--quantize", "f32", "q4_k_m"])
    return folder


@pytest.fixture(scope="module")
def client(exports: Path) -> OpenAI:
    """The openai client of llama.cpp's server, started with the settings of serving/llama_server.sh."""
    server = start_server(exports / "gguf" / "model-f32.gguf", n_ctx=256, num_slots=3)
    client = OpenAI(base_url=server.listening_address + "/v1", api_key="none")
    client.server = server  # type: ignore[attr-defined]  # the server ends with the object
    return client


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_generate_works_with_and_without_the_stop(exports: Path, form: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exports / form)
    model = AutoModelForCausalLM.from_pretrained(exports / form)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == render_prompt(QUESTION)
    prompt = tokenizer([text], return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=60, do_sample=False)  # no tokenizer: runs past <sep>, no error
    assert tokenizer.decode(output[0]).startswith(text + ANSWER)
    output = model.generate(**prompt, max_new_tokens=60, do_sample=False, stop_strings=[STOP], tokenizer=tokenizer)
    assert tokenizer.decode(output[0]) == text + ANSWER


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_transformers_chat_script_answers(
    exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    script = exports / form / "serving" / "transformers_chat.py"
    monkeypatch.setattr(sys, "argv", [str(script), QUESTION[0]["content"]])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip() == ANSWER.strip().removesuffix(STOP).strip()


@pytest.mark.parametrize("stop", [None, [STOP]], ids=["server's stop", "client's stop"])
def test_llama_cpp_answers_as_transformers(client: OpenAI, stop: list[str] | None) -> None:
    choice = ask(client, QUESTION, stop=stop).choices[0]
    assert choice.message.content.rstrip() == ANSWER.removesuffix(STOP).rstrip()
    assert choice.finish_reason == "stop"


def test_llama_cpp_streams_the_same_answer(client: OpenAI) -> None:
    chunks = list(ask(client, QUESTION, stream=True))
    assert len(chunks) > 5
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == ask(client, QUESTION).choices[0].message.content


def test_llama_server_script_serves_the_answer(exports: Path, tmp_path: Path) -> None:
    opened = [*QUESTION, {"role": "assistant", "content": "<reasoning>\nTwice"}]
    with serve_by_llama_cpp(exports / "gguf", tmp_path, "model-f32.gguf") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        assert [model.id for model in client.models.list().data] == ["gguf"]
        choice = ask(client, QUESTION, model="gguf").choices[0]
        continued = ask(client, opened, model="gguf").choices[0].message.content
    assert (choice.message.content.strip(), choice.finish_reason) == (ANSWER.removesuffix(STOP).strip(), "stop")
    assert ANSWER.removesuffix(STOP).rstrip().endswith(f"Twice{continued.rstrip()}")


def test_llama_cpp_returns_n_choices(client: OpenAI) -> None:
    choices = ask(client, QUESTION, n=3, temperature=2.0, extra_body={"min_p": 0, "top_k": 0}).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.content for choice in choices}) > 1


def test_llama_cpp_renders_turns_as_we_do(client: OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": "<reasoning>\nTwice 3.\n</reasoning>\n\n6"},
        *QUESTION,
    ]
    rendered = render_prompt(messages)
    assert "Twice" not in rendered
    completion = client.completions.create(model="any", prompt=rendered, max_tokens=60, temperature=0)
    chat = ask(client, messages)
    assert chat.choices[0].message.content.strip() == completion.choices[0].text.strip()
    assert chat.usage.prompt_tokens == completion.usage.prompt_tokens


def test_client_script_runs(exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # The script samples: room for two answers of the most tokens that it requests.
    server = start_server(exports / "gguf" / "model-f32.gguf", n_ctx=2048)
    script = exports / "gguf" / "serving" / "client.py"
    monkeypatch.setattr(sys, "argv", [str(script), server.listening_address + "/v1"])
    runpy.run_path(str(script), run_name="__main__")
    assert "answer: " in capsys.readouterr().out


def test_gguf_of_four_bits_answers_too(exports: Path) -> None:
    server = start_server(exports / "gguf" / "model-q4_k_m.gguf", n_ctx=256)
    client = OpenAI(base_url=server.listening_address + "/v1", api_key="none")
    assert parse_completion(ask(client, QUESTION).choices[0].message.content).reasoning is not None


def test_card_describes_the_training(exports: Path) -> None:
    records = [json.loads(line) for line in (exports / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("loss") is not None][-10:]
    for form, library in (("merged", "transformers"), ("adapter", "peft"), ("gguf", "llama.cpp")):
        card = ModelCard.load(exports / form / "README.md")
        assert card.data.library_name == library and card.data.pipeline_tag == "text-generation"
        assert f"{exports / 'model'} after 60 steps of supervised fine-tuning (LoRA)" in card.text
        assert "None" not in card.text and "generated" not in card.text  # transformers' own card
        assert f"| `loss` | {sum(losses) / len(losses):.4g} |" in card.text
        recipe = card.text.split("```yaml\n")[1].split("```")[0]
        assert YAML(typ="safe").load(recipe) == YAML(typ="safe").load((exports / "run" / "recipe.yaml").read_text())
    assert "Files: model-f32.gguf, model-q4_k_m.gguf." in card.text


def test_gguf_export_has_a_modelfile_for_each_file(exports: Path) -> None:
    for name in ("f32", "q4_k_m"):
        modelfile = exports / "gguf" / "serving" / f"Modelfile-{name}"
        lines = modelfile.read_text().splitlines()
        (source,) = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
        assert (modelfile.parent / source).resolve() == exports / "gguf" / f"model-{name}.gguf"
        assert 'PARAMETER stop "<sep>"' in lines and "PARAMETER num_ctx 2048" in lines
        assert f"ollama create gguf -f serving/Modelfile-{name} " in lines[0]


def test_export_files_are_readable_by_other_users(exports: Path) -> None:
    files = [path for form in ("merged", "adapter", "gguf") for path in (exports / form).rglob("*") if path.is_file()]
    assert len(files) > 20 and all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in files)


def test_adapter_names_its_base_by_absolute_path(exports: Path) -> None:
    config = json.loads((exports / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(exports / "model")
    script = (exports / "adapter" / "serving" / "vllm.sh").read_text()
    assert f"vllm serve {exports / 'model'} " in script and "--max-lora-rank 8 --lora-modules adapter=." in script
    assert "--max-model-len 2048" in script  # the model's own limit, as it is below 32k


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "q8_0"], "--as merged writes one of fp8, gptq, awq; the types of GGUF files need --as gguf"),
        (["--quantize", "fp8", "awq"], "--as merged writes one of fp8, gptq, awq"),
        (["--as", "adapter", "--quantize", "fp8"], "--quantize applies to GGUF files and merged weights"),
        (["--as", "gguf", "--quantize", "fp8"], "--quantize fp8: the types are f32, bf16, f16"),
        (["--as", "adapter", "--dtype", "bfloat16"], "--dtype bfloat16 applies to merged weights"),
        (["--as", "gguf", "--quantize", "q8_0", "q8_0"], "names a type twice"),
    ],
)
def test_export_rejects_options_of_other_forms_in_one_line(
    exports: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["export", str(exports / "run"), str(exports / "never"), *options])
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (exports / "never").exists()


def test_export_rejects_an_adapter_of_a_full_run(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", str(exports / "recipe.yaml"), "lora=null", "sft.max_steps=1", f"output_dir={exports / 'full'}"])
    with pytest.raises(SystemExit):
        main(["export", str(exports / "full"), str(exports / "never"), "--as", "adapter"])
    assert "trained all weights, so there is no adapter" in capsys.readouterr().err


def test_last_metrics_end_at_the_exported_step(tmp_path: Path) -> None:
    lines = [
        {"step": step, "reward": float(step), "rewards/math/mean": None if step % 2 else 1.0} for step in range(1, 31)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_metrics(tmp_path, "rloo", 20) == {"reward": 15.5, "rewards/math/mean": 1.0}
    assert last_metrics(tmp_path, "rloo", 4) == {"reward": 2.5, "rewards/math/mean": 1.0}
    assert last_metrics(tmp_path / "none", "rloo", 4) == {}


def test_export_of_a_reward_model_has_one_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"stage": "reward", "output_dir": "run", "model": {"pretrained_model_name_or_path": "none"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"dataset": {"path": "none.jsonl"}}))
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), str(tmp_path / "out"), "--as", "gguf"])
    assert "a reward model is exported as merged only" in capsys.readouterr().err


def test_export_names_a_missing_package_before_loading(
    exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "rekatrain.trainer.export.gguf_files.find_spec", lambda name: None if name == "xllamacpp" else name
    )
    with pytest.raises(SystemExit):
        main(["export", str(exports / "run"), str(exports / "never"), "--as", "gguf"])
    assert "--as gguf needs xllamacpp: pip install 'rekatrain[gguf]'" in capsys.readouterr().err
