"""Bad recipes and bad data: one line names the mistake, before a weight is loaded or a file written."""

import logging
import shutil

import pytest

from rekatrain.trainer.cli import main
from rekatrain.trainer.run.folder import RECIPE_FILE
from tests.trainer.small_recipes import ROWS, STAGES, write_rows

# The good recipe: each recipe below differs from it in the mistake alone


@pytest.mark.parametrize("stage", STAGES)
def test_good_recipe_passes_every_check(stage, recipe_of, no_weights, workspace, capsys):
    recipe = recipe_of(stage)
    main(["train", recipe, "--dry-run"])
    shown = capsys.readouterr()
    assert f"stage: {stage}\n" in shown.out
    assert ("# 3 rows" if stage == "sft" else "# 3 prompts") in shown.out
    assert shown.err == ""
    assert sorted(path.name for path in workspace.iterdir()) == ["recipe.yaml", "rows.jsonl"]


# The recipe


def test_recipe_that_is_missing_is_reported(error_of):
    assert error_of("train", "absent.yaml") == "no recipe at 'absent.yaml'"


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
            "unknown key rewards.reasoning_format.wieght: did you mean rewards.reasoning_format.weight?",
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
def test_recipe_reports_a_wrong_key_or_value(stage, override, message, recipe_of, error_of):
    assert error_of("train", recipe_of(stage), override).startswith(message)


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
def test_recipe_reports_a_wrong_key_of_an_unused_section(stage, override, message, recipe_of, error_of):
    assert error_of("train", recipe_of(stage), override).startswith(message)


def test_overrides_may_precede_and_follow_the_options(recipe_of, no_weights, capsys):
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


def test_evaluate_reports_an_unknown_key(recipe_of, error_of):
    recipe = recipe_of("rloo", evaluate={"temprature": 1})
    assert error_of("evaluate", recipe) == "unknown key evaluate.temprature: did you mean evaluate.temperature?"


# The data


def test_dataset_reports_a_missing_file(recipe_of, error_of, workspace):
    for stage in STAGES:
        message = error_of("train", recipe_of(stage, dataset={"path": "absent.jsonl"}))
        assert message.startswith("absent.jsonl does not exist or is not a file; a relative path starts at ")


def test_dataset_must_have_a_row(recipe_of, error_of, workspace):
    write_rows(workspace / "empty.jsonl")
    for stage in STAGES:
        assert error_of("train", recipe_of(stage, dataset={"path": "empty.jsonl"})) == "empty.jsonl has no good row"


def test_dataset_reports_file_and_line_of_a_bad_row(recipe_of, error_of, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], {"messages": [{"role": "user", "content": "a <sep> b"}]})
    for stage in STAGES:
        assert error_of("train", recipe_of(stage)) == (
            "rows.jsonl:2: message 1 (user) holds a literal <sep>, which would end its turn"
        )


def test_dataset_reports_a_line_that_is_not_json(recipe_of, error_of, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], "", '{"messages": [')
    for stage in STAGES:
        assert error_of("train", recipe_of(stage)).startswith("rows.jsonl:3: it is not valid JSON: ")


def test_sft_rejects_a_row_without_an_answer(recipe_of, error_of, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], {"messages": ROWS[0]["messages"][:1]})
    assert error_of("train", recipe_of("sft")) == (
        "rows.jsonl:2: no assistant message to train; stage sft needs one in every row"
    )


def test_rloo_rejects_a_prompt_longer_than_the_context(recipe_of, error_of, workspace):
    write_rows(workspace / "rows.jsonl", ROWS[0], {"messages": [{"role": "user", "content": "x" * 300}]})
    message = error_of("train", recipe_of("rloo"))
    assert message.startswith("rows.jsonl:2: the prompt has 3")
    assert message.endswith(
        " tokens; with max_completion_length 4 it exceeds the model's context of 256; "
        "shorten it, or set dataset.bad_rows to skip"
    )


def test_sft_rejects_a_row_longer_than_max_length(recipe_of, error_of):
    assert error_of("train", recipe_of("sft"), "sft.max_length=8") == (
        "3 of 3 rows are longer than 8 tokens (the smaller of sft.max_length and the model's context): "
        "rows.jsonl:1 (16 tokens), rows.jsonl:2 (16 tokens), rows.jsonl:3 (17 tokens); "
        "raise sft.max_length, or set dataset.long_rows to skip or truncate"
    )


def test_sft_rejects_a_row_longer_than_the_context(recipe_of, error_of, workspace):
    long_row = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    write_rows(workspace / "rows.jsonl", *ROWS, long_row)
    assert error_of("train", recipe_of("sft"), "sft.max_length=1000").startswith(
        "1 of 4 rows are longer than 256 tokens "
    )


def test_bad_rows_skip_counts_the_skipped_rows(recipe_of, no_weights, workspace, capsys, caplog):
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
        expected = (
            "1 of 4 rows are longer than 256" if stage == "sft" else "dataset: 1 prompts too long, skipped; the first: "
        )
        assert warnings[1].startswith(expected)


# The run folder


def test_output_dir_with_another_run_is_rejected(recipe_of, error_of, workspace):
    for stage in STAGES:
        recipe = recipe_of(stage)
        (workspace / "run").mkdir(exist_ok=True)
        shutil.copy(recipe, workspace / "run" / RECIPE_FILE)
        assert error_of("train", recipe) == (
            "output_dir 'run' already holds a run; continue it with --resume or choose another folder"
        )


def test_output_dir_with_other_files_is_rejected(recipe_of, error_of, workspace):
    (workspace / "run").mkdir()
    (workspace / "run" / "thesis.txt").write_text("mine")
    for stage in STAGES:
        for extra in ([], ["--resume"], ["--dry-run"]):
            assert error_of("train", recipe_of(stage), *extra) == (
                "output_dir 'run' is not a run folder and not empty; choose another"
            )


def test_output_dir_that_is_a_file_is_rejected(recipe_of, error_of, workspace):
    (workspace / "run").write_text("mine")
    assert error_of("train", recipe_of("sft")) == "output_dir 'run' is not a run folder and not empty; choose another"


@pytest.mark.parametrize("stage", STAGES)
def test_resume_reports_the_changed_keys(stage, recipe_of, error_of, workspace):
    recipe = recipe_of(stage)
    (workspace / "run").mkdir()
    shutil.copy(recipe, workspace / "run" / RECIPE_FILE)
    default = {"sft": 2e-05, "rloo": 1e-06}[stage]
    # The length of a run and its tracking may change.
    overrides = ["seed=1", f"{stage}.learning_rate=0.5", f"{stage}.max_steps=9", "wandb.project=x"]
    assert error_of("train", recipe, *overrides, "--resume") == (
        f"--resume: seed was 0 and is 1: every random choice follows from it; {stage}.learning_rate was {default} and "
        "is 0.5: it changes the size of the steps. Set it back, or start another run, from the weights of this one: "
        "rekatrain export RUN OUT"
    )


# Evaluation


def test_evaluate_needs_held_out_rows(recipe_of, error_of):
    assert error_of("evaluate", recipe_of("rloo")) == (
        "the recipe has no eval_dataset section: name the held-out rows there"
    )


def test_evaluate_rejects_rows_of_the_training_set(recipe_of, error_of):
    recipe = recipe_of(
        "rloo",
        eval_dataset={"path": "rows.jsonl", "limit": 2},
        evaluate={"reward": "reasoning_format", "max_completion_length": 4},
    )
    assert error_of("evaluate", recipe) == ("every prompt of eval_dataset is in dataset too: there is nothing held out")
