"""Whatever is wrong with what the user gave is told on one line, before a weight is loaded or a file written."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import wandb
from accelerate.tracking import WandBTracker
from transformers import AutoModelForCausalLM

from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run_folder import METRICS_FILE, RECIPE_FILE, RunFolder, read_records
from rekatrain.trainer.run_log import RunLog

ROWS = [
    {"messages": [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": str(2 * n)}]}
    for n in range(1, 4)
]
STAGES = {
    "sft": {"sft": {"max_steps": 1, "gradient_checkpointing": False}},
    "rloo": {
        "rloo": {
            "max_steps": 1,
            "prompts_per_step": 1,
            "num_generations": 2,
            "max_completion_length": 4,
            "per_device_generation_batch_size": 2,
        },
        "rewards": {"reasoning_format": None},
    },
}
DATASET = {"path": "rows.jsonl"}
LORA = {"r": 2, "target_modules": "all-linear"}

Rekatrain = Callable[..., str]


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, which is also home; the command line's entry on sys.path goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading any weights fails the test."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("weights would be loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture
def recipe_of(model_folder: Path, workspace: Path) -> Callable[..., str]:
    """Writes a good recipe of a stage, with some sections replaced, and three rows; gives its path."""

    def write(stage: str, **sections: object) -> str:
        if not (workspace / "rows.jsonl").exists():
            write_rows(workspace / "rows.jsonl", *ROWS)
        recipe = {
            "stage": stage,
            "output_dir": "run",
            "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
            "dataset": DATASET,
            **STAGES[stage],
            **sections,
        }
        (workspace / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        return "recipe.yaml"

    return write


@pytest.fixture
def refused(no_weights: None, workspace: Path, capsys: pytest.CaptureFixture[str]) -> Rekatrain:
    """Runs a command that must be refused; gives what follows `rekatrain: error: ` on its one line."""

    def run(*arguments: str) -> str:
        def everything() -> dict[Path, bytes | None]:
            return {path: path.read_bytes() if path.is_file() else None for path in sorted(workspace.rglob("*"))}

        before = everything()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        told = capsys.readouterr().err
        assert stopped.value.code == 2
        assert told.endswith("\n") and told.count("\n") == 1, told
        assert everything() == before
        prefix = "rekatrain: error: "
        assert told.startswith(prefix)
        return told.removeprefix(prefix).removesuffix("\n")

    return run


def copy_model(model_folder: Path, to: Path, **config: object) -> dict[str, str]:
    """A `model:` section for a copy of the tiny model whose config.json is changed."""
    shutil.copytree(model_folder, to)
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return {"pretrained_model_name_or_path": str(to), "dtype": "float32"}


# The good recipe, so that what is refused below is refused for its own fault


@pytest.mark.parametrize("stage", STAGES)
def test_a_good_recipe_passes_every_check(stage, recipe_of, no_weights, workspace, capsys):
    recipe = recipe_of(stage)
    main(["train", recipe, "--dry-run"])
    shown = capsys.readouterr()
    assert f"stage: {stage}\n" in shown.out
    assert ("# 3 rows" if stage == "sft" else "# 3 prompts") in shown.out
    assert shown.err == ""
    assert sorted(path.name for path in workspace.iterdir()) == ["recipe.yaml", "rows.jsonl"]


# The recipe


def test_a_missing_recipe_is_refused(refused):
    assert refused("train", "absent.yaml") == "no recipe at 'absent.yaml'"


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("rloo", "rloo.kl_estimator=k1", "unknown key rloo.kl_estimator: did you mean rloo.kl_placement?"),
        ("sft", "datset.path=x", "unknown key datset: did you mean dataset?"),
        ("sft", "sft.learning_rat=1", "unknown key sft.learning_rat: did you mean sft.learning_rate?"),
        ("sft", "sft.output_dir=x", "sft.output_dir is set by the program: remove it from the recipe"),
        ("rloo", "rloo.num_generation=4", "unknown key rloo.num_generation: did you mean rloo.num_generations?"),
        ("rloo", "model.dtyp=float32", "unknown key model.dtyp: did you mean model.dtype?"),
        ("sft", "model.dtyp=float32", "unknown key model.dtyp: did you mean model.dtype?"),
        ("sft", "dataset.pth=x", "unknown key dataset.pth: did you mean dataset.path?"),
        ("rloo", "dataset.pth=x", "unknown key dataset.pth: did you mean dataset.path?"),
        ("sft", "lora.target_module=x", "unknown key lora.target_module: did you mean lora.target_modules?"),
        ("sft", "chat.end_of_turns=eos", "unknown key chat.end_of_turns: did you mean chat.end_of_turn?"),
        ("sft", "chat.rows=x", "chat.rows is set by the program: remove it from the recipe"),
        (
            "rloo",
            "rewards.reasoning_format.wieght=1",
            "reward reasoning_format has no option wieght, did you mean weight?",
        ),
        ("rloo", "rloo.beta=high", "rloo.beta is 'high'; it should be a valid number"),
        ("rloo", "rloo.num_generations=1", "rloo.num_generations is 1; it should be greater than or equal to 2"),
        ("rloo", "model.dtype=float16", "model.dtype is 'float16'; it should be 'float32' or 'bfloat16'"),
        ("sft", "chat.end_of_turn=stop", "chat.end_of_turn is 'stop'; it should be 'sep', 'sep_eos' or 'eos'"),
        ("sft", "lora={r: two}", "lora.r is 'two'; it should be a valid integer"),
        ("sft", "sft.save_strategy=no", "sft.save_strategy is no: the run would leave nothing behind"),
        ("rloo", "rloo.max_steps", "'rloo.max_steps' is not an override; write dotted.key=value"),
        ("rloo", "stage.x=1", "'stage.x=1': stage is a value, not a section"),
        ("rloo", "rloo={beta", "the override 'rloo={beta' is not valid YAML: "),
        ("rloo", "model=null", "model is None; it should be a valid dictionary"),
    ],
)
def test_a_wrong_key_or_value_is_named(stage, override, message, recipe_of, refused):
    assert refused("train", recipe_of(stage), override).startswith(message)


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("rloo", "sft.learning_rat=1", "unknown key sft.learning_rat: did you mean sft.learning_rate?"),
        ("rloo", "chat.end_of_turns=eos", "unknown key chat.end_of_turns: did you mean chat.end_of_turn?"),
        ("rloo", "evaluate.rewards=x", "unknown key evaluate.rewards: did you mean evaluate.reward?"),
        ("rloo", "eval_dataset.pth=x", "unknown key eval_dataset.pth: did you mean eval_dataset.path?"),
        ("sft", "rloo.num_generation=4", "unknown key rloo.num_generation: did you mean rloo.num_generations?"),
    ],
)
def test_a_wrong_key_is_named_in_a_section_that_the_stage_does_not_read(stage, override, message, recipe_of, refused):
    assert refused("train", recipe_of(stage), override).startswith(message)


def test_overrides_may_stand_before_and_after_the_options(recipe_of, no_weights, capsys):
    recipe = recipe_of("rloo")
    for arguments in (
        ["--dry-run", recipe, "seed=7", "rloo.beta=0.5"],
        [recipe, "seed=7", "rloo.beta=0.5", "--dry-run"],
        [recipe, "--dry-run", "seed=7", "rloo.beta=0.5"],
        [recipe, "seed=7", "--dry-run", "rloo.beta=0.5"],
    ):
        main(["train", *arguments])
        shown = capsys.readouterr().out
        assert "seed: 7\n" in shown and "  beta: 0.5\n" in shown


def test_an_unknown_key_of_evaluate_is_named(recipe_of, refused):
    recipe = recipe_of("rloo", evaluate={"temprature": 1})
    assert refused("evaluate", recipe) == "unknown key evaluate.temprature: did you mean evaluate.temperature?"


# The data


def test_a_missing_data_file_is_named(recipe_of, refused, workspace):
    for stage in STAGES:
        message = refused("train", recipe_of(stage, dataset={"path": "absent.jsonl"}))
        assert message.startswith("absent.jsonl does not exist or is not a file; a relative path starts at ")


def test_an_empty_data_set_is_refused(recipe_of, refused, workspace):
    write_rows(workspace / "empty.jsonl")
    for stage in STAGES:
        assert refused("train", recipe_of(stage, dataset={"path": "empty.jsonl"})) == "empty.jsonl has no good row"


def test_a_bad_row_is_named_by_file_and_line(recipe_of, refused, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], {"messages": [{"role": "user", "content": "a <sep> b"}]})
    for stage in STAGES:
        assert refused("train", recipe_of(stage)) == (
            "rows.jsonl:2: message 1 (user) holds a literal <sep>, which would end its turn"
        )


def test_a_line_that_is_not_json_is_named(recipe_of, refused, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], "", '{"messages": [')
    for stage in STAGES:
        assert refused("train", recipe_of(stage)).startswith("rows.jsonl:3: it is not valid JSON: ")


def test_a_row_without_an_answer_is_refused_by_sft(recipe_of, refused, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], {"messages": ROWS[0]["messages"][:1]})
    assert refused("train", recipe_of("sft")) == (
        "rows.jsonl:2: no assistant message to train; stage sft needs one in every row"
    )


def test_a_prompt_longer_than_the_context_is_refused(recipe_of, refused, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], {"messages": [{"role": "user", "content": "x" * 300}]})
    message = refused("train", recipe_of("rloo"))
    assert message.startswith("rows.jsonl:2: the prompt has 3")
    assert message.endswith(
        " tokens; with max_completion_length 4 it exceeds the model's context of 256; "
        "shorten it, or set dataset.bad_rows to skip"
    )


def test_an_sft_row_longer_than_max_length_is_refused(recipe_of, refused):
    assert refused("train", recipe_of("sft"), "sft.max_length=8") == (
        "3 of 3 rows are longer than 8 tokens (the smaller of sft.max_length and the model's context); "
        "raise sft.max_length, or set dataset.bad_rows to skip"
    )


def test_an_sft_row_longer_than_the_context_is_refused(recipe_of, refused, workspace):
    long_row = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    write_rows(workspace / "rows.jsonl", *ROWS, long_row)
    assert refused("train", recipe_of("sft"), "sft.max_length=1000").startswith(
        "1 of 4 rows are longer than 256 tokens "
    )


def test_skipped_bad_rows_are_counted(recipe_of, no_weights, workspace, capsys, caplog):
    long_row = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    write_rows(workspace / "rows.jsonl", *ROWS, "{", {"messages": []}, long_row)
    dataset = {"path": "rows.jsonl", "bad_rows": "skip"}
    for stage, count in {"sft": "# 3 rows", "rloo": "# 3 prompts"}.items():
        caplog.clear()
        main(["train", "--dry-run", recipe_of(stage, dataset=dataset)])
        assert count in capsys.readouterr().out
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 2
        assert warnings[0].startswith("rows.jsonl: 2 bad rows skipped; the first: rows.jsonl:4: it is not valid JSON: ")
        told = (
            "1 of 4 rows are longer than 256" if stage == "sft" else "dataset: 1 prompts too long, skipped; the first: "
        )
        assert warnings[1].startswith(told)


# The model


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_folder_that_is_not_there_is_named(stage, recipe_of, refused):
    assert refused("train", recipe_of(stage), "model.pretrained_model_name_or_path=./absent") == (
        "no model folder at './absent'"
    )


def test_a_model_folder_without_weights_is_named(recipe_of, workspace, model_folder, capsys):
    model = copy_model(model_folder, workspace / "model")
    (workspace / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["train", recipe_of("rloo", model=model)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rekatrain: error: ") and str(workspace / "model") in line
    assert not (workspace / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(stage, recipe_of, refused, workspace, model_folder):
    model = copy_model(model_folder, workspace / "model", vocab_size=299)
    assert refused("train", recipe_of(stage, model=model)) == (
        f"the model has 299 embedding rows but the tokenizer 300 ids: {str(workspace / 'model')!r} "
        "holds the tokenizer of another model"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_an_eos_of_the_config_that_is_not_the_tokenizers_is_refused(stage, recipe_of, refused, workspace, model_folder):
    model = copy_model(model_folder, workspace / "model", eos_token_id=7)
    assert refused("train", recipe_of(stage, model=model)).startswith(
        "config.json names eos id 7, the tokenizer 0 (<|endoftext|>): a model with the wrong eos never stops"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_lora_targets_that_the_model_lacks_are_named(stage, recipe_of, refused):
    message = refused("train", recipe_of(stage, lora={"r": 2, "target_modules": ["no_such_proj"]}))
    assert message.startswith("lora: ") and "no_such_proj" in message


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("quantization", "lora", "message"),
    [
        ({"load_in_4bit": True}, LORA, "needs a GPU, and there is none"),
        ({"load_in_4bit": True}, None, "needs a lora: section"),
        ({"bnb_4bit_quant_type": "nf4"}, LORA, "quantizes nothing: set load_in_4bit: true"),
        ({"load_in_4bits": True}, LORA, "did you mean model.quantization_config.load_in_4bit?"),
    ],
)
def test_a_quantization_that_cannot_be_trained_is_refused(stage, quantization, lora, message, recipe_of, refused):
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU, which this refusal is about")
    path = recipe_of(stage, lora=lora)
    settings = ", ".join(f"{key}: {json.dumps(value)}" for key, value in quantization.items())
    assert message in refused("train", path, f"model.quantization_config={{{settings}}}")


@pytest.mark.parametrize("key", ["deepspeed", "fsdp"])
def test_how_a_run_is_sharded_is_not_the_recipes_to_say(key, recipe_of, refused):
    message = refused("train", recipe_of("sft"), f"sft.{key}=ds.json")
    assert message == f"sft.{key} is set by the program: remove it from the recipe"


def test_lora_dropout_is_refused_by_rloo(recipe_of, refused):
    assert refused("train", recipe_of("rloo", lora={**LORA, "lora_dropout": 0.1})).startswith(
        "lora.lora_dropout is 0.1, but must be 0 in stage rloo"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("sliding_window", 16), ("attention_chunk_size", 8), ("attn_logit_softcapping", 50.0)]
)
def test_a_model_whose_attention_is_not_llamas_is_refused_by_what_samples(
    key, value, recipe_of, refused, model_folder, workspace
):
    recipe = recipe_of("rloo", model=copy_model(model_folder, workspace / "m", **{key: value}), eval_dataset=DATASET)
    for command in ("train", "evaluate"):
        message = refused(command, recipe)
        assert message.startswith(f"the model's config.json has {key} {value}: sampling and RLOO attend to every")


def test_an_attention_that_rloo_would_not_use_is_refused(recipe_of, refused, model_folder):
    model = {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32", "attn_implementation": "eager"}
    assert refused("train", recipe_of("rloo", model=model)) == (
        "model.attn_implementation is 'eager', but stage rloo brings its own attention: take the key out"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_full_fine_tuning_of_bfloat16_weights_is_refused(stage, recipe_of, refused, model_folder):
    unsaid = {"pretrained_model_name_or_path": str(model_folder)}  # bfloat16 is what dtype is where nothing is said
    for model in ({**unsaid, "dtype": "bfloat16"}, unsaid):
        assert refused("train", recipe_of(stage, model=model)).startswith(
            "full fine-tuning of bfloat16 weights rounds small updates away: set model.dtype to float32"
        )


def test_an_adapter_is_not_trained_on(recipe_of, refused, workspace, model_folder):
    adapter = workspace / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model_folder)})
    )
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, adapter)
    for stage in STAGES:
        assert refused("train", recipe_of(stage), f"model.pretrained_model_name_or_path={adapter}").startswith(
            f"{str(adapter)!r} is an adapter on {str(model_folder)!r}; make one model of them"
        )


# The rewards


def test_no_rewards_are_refused(recipe_of, refused):
    assert refused("train", recipe_of("rloo", rewards={})) == (
        "rewards: at least one reward must have a weight other than 0; the recipe has None"
    )


def test_an_unknown_reward_is_named(recipe_of, refused):
    assert refused("train", recipe_of("rloo", rewards={"math_answr": None})).startswith(
        "there is no reward math_answr, did you mean math_answer?"
    )


def test_a_column_that_a_reward_needs_and_the_rows_lack_is_named(recipe_of, refused):
    assert refused("train", recipe_of("rloo", rewards={"math_answer": None})) == (
        "reward math_answer needs the column answer, which the rows do not have (columns: none); "
        "add it to the data or take the reward out of the recipe"
    )


def test_a_reward_that_returns_too_few_values_is_named(recipe_of, workspace, capsys):
    (workspace / "short_rewards.py").write_text("def short(completions, **kwargs):\n    return [1.0]\n")
    for command in (["train"], ["sample"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, recipe_of("rloo", rewards={"short_rewards:short": None}, output_dir=command[0])])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "rekatrain: error: reward short_rewards:short returned 1 values; "
            "expected a list of 2, one finite number or None a completion"
        )


def test_a_reward_that_raises_shows_its_name_and_its_traceback(recipe_of, workspace, capsys):
    (workspace / "broken_rewards.py").write_text("def broken(completion):\n    return 1 / 0\n")
    with pytest.raises(SystemExit) as stopped:
        main(["sample", recipe_of("rloo", rewards={"broken_rewards:broken": None})])
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "error: reward broken_rewards:broken failed on " in told and "in broken" in told
    assert told.rstrip().endswith("ZeroDivisionError: division by zero")


# The run folder


def test_an_output_dir_with_another_run_is_refused(recipe_of, refused, workspace):
    for stage in STAGES:
        recipe = recipe_of(stage)
        (workspace / "run").mkdir(exist_ok=True)
        shutil.copy(recipe, workspace / "run" / RECIPE_FILE)
        assert refused("train", recipe) == (
            "output_dir 'run' already holds a run; continue it with --resume or choose another folder"
        )


def test_a_foreign_folder_is_refused(recipe_of, refused, workspace):
    (workspace / "run").mkdir()
    (workspace / "run" / "thesis.txt").write_text("mine")
    for stage in STAGES:
        for extra in ([], ["--resume"], ["--dry-run"]):
            assert refused("train", recipe_of(stage), *extra) == (
                "output_dir 'run' is not a run folder and not empty; choose another"
            )


def test_an_output_dir_that_is_a_file_is_refused(recipe_of, refused, workspace):
    (workspace / "run").write_text("mine")
    assert refused("train", recipe_of("sft")) == "output_dir 'run' is not a run folder and not empty; choose another"


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_with_a_changed_recipe_names_what_changed(stage, recipe_of, refused, workspace):
    recipe = recipe_of(stage)
    (workspace / "run").mkdir()
    shutil.copy(recipe, workspace / "run" / RECIPE_FILE)
    changed = sorted(["seed", f"{stage}.learning_rate"])
    # How long a run goes on and who is told of it may change.
    overrides = ["seed=1", f"{stage}.learning_rate=0.5", f"{stage}.max_steps=9", "wandb.project=x"]
    assert refused("train", recipe, *overrides, "--resume") == (
        f"--resume: the recipe differs from {str(Path('run') / RECIPE_FILE)!r} in {', '.join(changed)}; "
        "set it back or choose another output_dir"
    )


# Evaluation


def test_evaluation_without_held_out_rows_is_refused(recipe_of, refused):
    assert refused("evaluate", recipe_of("rloo")) == (
        "the recipe has no eval_dataset section: name the held-out rows there"
    )


def test_evaluation_on_rows_of_the_training_set_is_refused(recipe_of, refused):
    recipe = recipe_of(
        "rloo",
        eval_dataset={"path": "rows.jsonl", "limit": 2},
        evaluate={"reward": "reasoning_format", "max_completion_length": 4},
    )
    assert refused("evaluate", recipe) == ("every prompt of eval_dataset is in dataset too: there is nothing held out")


# Weights & Biases never ends a run


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    """No account, and nothing that says where wandb should write but the current folder."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(workspace / "home"))


def run_log(workspace: Path, **section: object) -> RunLog:
    recipe = Recipe(
        stage="rloo",
        output_dir=str(workspace / "run"),
        model={"pretrained_model_name_or_path": "m"},
        dataset={"path": "rows.jsonl"},
        wandb=section,
    )
    run = RunFolder(recipe.output_dir)
    run.start(recipe, 0)
    return RunLog(run, recipe, first_step=0, max_steps=2)


def take_two_steps(log: RunLog, workspace: Path) -> None:
    log.step(1, {"reward": 0.5, "kl": None}, headline=["reward"])
    log.step(2, {"reward": 1.0, "kl": None}, headline=["reward"])
    log.close()
    assert read_records(workspace / "run" / METRICS_FILE) == [
        {"step": 1, "reward": 0.5, "kl": None},
        {"step": 2, "reward": 1.0, "kl": None},
    ]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("trainer")]


def test_wandb_without_an_account_writes_an_offline_run(offline, workspace, caplog):
    log = run_log(workspace, project="test")
    assert wandb.run is not None and wandb.run.settings.mode == "offline"
    assert wandb.run.config["stage"] == "rloo"
    take_two_steps(log, workspace)
    assert wandb.run is None
    assert len(list(workspace.rglob("offline-run-*/run-*.wandb"))) == 1
    assert warnings_of(caplog) == []


def fail(*_: object, **__: object) -> None:
    raise ConnectionError("no route to the service")


@pytest.mark.parametrize(
    ("method", "warning"),
    [
        ("start", "wandb could not start: no route to the service; the run goes on without it"),
        ("store_init_configuration", "wandb could not start: no route to the service; the run goes on without it"),
        ("log", "wandb stopped: no route to the service; metrics go on in metrics.jsonl"),
        ("finish", None),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    method, warning, offline, workspace, caplog, monkeypatch
):
    for name in ("start", "store_init_configuration", "log", "finish"):
        monkeypatch.setattr(WandBTracker, name, fail if name == method else lambda *_, **__: None)
    take_two_steps(run_log(workspace), workspace)
    told = warnings_of(caplog)
    assert len(told) == 1
    assert warning is None or told == [warning]


def test_a_key_that_wandb_does_not_know_leaves_the_run_going(offline, workspace, caplog):
    take_two_steps(run_log(workspace, projct="x"), workspace)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("wandb could not start: ") and "projct" in warning
