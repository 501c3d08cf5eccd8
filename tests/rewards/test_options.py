"""Options of rewards: a wrong one is one line and exit code 2, through the real command line; the right ones pass."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rekatrain.rewards import compose
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.registry import REWARDS, Unresolved, read_signature
from rekatrain.rewards.scorers.text import LANGUAGES
from rekatrain.trainer.cli import main

ENDPOINT = {"base_url": "http://127.0.0.1:9", "model": "judge", "rubric": "Be polite."}
SERVER = {"url": "http://127.0.0.1:9", "route": "classify"}

# reward, its options, and the message: after `rewards.NAME`, but for an unknown key
WRONG: list[tuple[str, object, str]] = [
    # the keys of every reward
    ("math_answer", 1.0, " is 1.0; it should be a valid dictionary"),
    ("math_answer", {"weight": "1"}, ".weight is '1'; it should be a valid number"),
    ("math_answer", {"weight": True}, ".weight is True; it should be a valid number"),
    ("math_answer", {"weight": ".nan"}, ".weight is nan; it should be a finite number"),
    ("math_answer", {"weight": None}, ".weight is None; it should be a valid number"),
    ("math_answer", {"weigth": 1}, "unknown key rewards.math_answer.weigth: did you mean rewards.math_answer.weight?"),
    ("math_answer", {"timeout": 0}, ".timeout is 0; it should be greater than 0"),
    ("math_answer", {"timeout": -1.5}, ".timeout is -1.5; it should be greater than 0"),
    ("math_answer", {"timeout": "2 s"}, ".timeout is '2 s'; it should be a valid number"),
    ("math_answer", {"timeout": ".inf"}, ".timeout is inf; it should be a finite number"),
    ("math_answer", {"requires": 1}, ".requires is 1; it should be a valid string or be a valid list"),
    ("math_answer", {"requires": [1]}, ".requires is [1]; it should be a valid string"),
    ("math_answer", {"requires": "formt"}, ".requires is 'formt': formt is no other reward"),
    ("math_answer", {"requires": "math_answer"}, ".requires is 'math_answer': math_answer is no other"),
    # scorers
    ("math_answer", {"answer": "4"}, ".answer is a column of the rows and not an option"),
    ("exact_match", {"ignore_case": "no"}, ".ignore_case is 'no'; it should be a valid boolean"),
    ("exact_match", {"ignore_case": 1}, ".ignore_case is 1; it should be a valid boolean"),
    ("numeric_close", {"rel_tol": "small"}, ".rel_tol is 'small'; it should be a valid number"),
    ("numeric_close", {"rel_tol": -0.1}, ".rel_tol is -0.1; it should be greater than or equal to 0"),
    ("numeric_close", {"abs_tol": ".nan"}, ".abs_tol is nan; it should be a finite number"),
    ("multiple_choice", {"letters": "AB"}, "unknown key rewards.multiple_choice.letters: known keys: "),
    ("regex", None, ".pattern is missing: add it to the recipe"),
    ("regex", {"pattern": 42}, ".pattern is 42; it should be a valid string"),
    ("regex", {"pattern": "("}, ": pattern '(' is not a regular expression: "),
    ("regex", {"pattern": "Paris", "whole": "no"}, ".whole is 'no'; it should be a valid boolean"),
    ("json_schema", {"schema": 5}, ".schema is 5; it should be a valid dictionary or be a valid string"),
    ("json_schema", {"schema": {"type": "objekt"}}, ": schema is not a JSON schema: "),
    ("json_schema", {"schema": "absent.json"}, ": schema 'absent.json' cannot be read as JSON: "),
    ("json_schema", {"schema": "five.json"}, ": schema 'five.json' holds no JSON object but int"),
    ("json_schema", {"schema": {}, "text_around": "no"}, ".text_around is 'no'; it should be a valid"),
    ("reasoning_gym", {"time_limit": 0}, ".time_limit is 0; it should be greater than 0"),
    ("reasoning_gym", {"memory_limit_mb": 100}, ".memory_limit_mb is 100; it should be greater than or equal to 256"),
    ("reasoning_gym", {"isolation": "none"}, ".isolation is 'none'; it should be 'namespaces' or 'rlimits'"),
    ("reasoning_gym", {"partial_credit": True}, "unknown key rewards.reasoning_gym.partial_credit: known keys: "),
    ("reasoning_format", {"strict": True}, "unknown key rewards.reasoning_format.strict: known keys: "),
    ("repetition", {"ngram": "4"}, ".ngram is '4'; it should be a valid integer"),
    ("repetition", {"ngram": 2.5}, ".ngram is 2.5; it should be a valid integer"),
    ("repetition", {"ngram": 0}, ".ngram is 0; it should be greater than or equal to 1"),
    ("language", {"language": "english"}, ": language is 'english'; it should be one of the codes "),
    ("language", {"language": "xx"}, ": language is 'xx'; it should be one of the codes that py3langid "),
    ("language", {"max_other_script": "x"}, ".max_other_script is 'x'; it should be a valid number"),
    ("language", {"max_other_script": 2}, ".max_other_script is 2; it should be less than or equal to 1"),
    ("length", {"shape": "cosine"}, ".max_length is missing: add it to the recipe"),
    ("length", {"max_length": 9, "shape": "cosin"}, ".shape is 'cosin'; it should be 'overlong' or 'cosine'"),
    ("length", {"max_length": 0, "buffer": 1}, ".max_length is 0; it should be greater than or equal to 1"),
    ("length", {"max_length": 9}, ": buffer is missing: shape overlong needs the number of tokens over "),
    ("length", {"max_length": 9, "buffer": 10}, ": buffer is 10; it should be at most max_length (9)"),
    (
        "length",
        {"max_length": 9, "buffer": 5, "shape": "cosine"},
        ": buffer is 5, but shape cosine has none: take it out",
    ),
    ("instruction_following", {"partial_credit": "no"}, ".partial_credit is 'no'; it should"),
    ("code_tests", {"time_limit": 0}, ".time_limit is 0; it should be greater than 0"),
    ("code_tests", {"time_limit": ".inf"}, ".time_limit is inf; it should be a finite number"),
    ("code_tests", {"memory_limit_mb": 0.5}, ".memory_limit_mb is 0.5; it should be a valid integer"),
    ("code_tests", {"max_processes": 0}, ".max_processes is 0; it should be greater than or equal to 1"),
    ("code_tests", {"partial_credit": "no"}, ".partial_credit is 'no'; it should be a valid boolean"),
    ("code_tests", {"isolation": "none"}, ".isolation is 'none'; it should be 'namespaces' or 'rlimits'"),
    # models
    ("reward_model", {"pretrained_model_name_or_path": 5}, ".pretrained_model_name_or_path is 5; "),
    (
        "reward_model",
        {"pretrained_model_name_or_path": "./absent"},
        ": pretrained_model_name_or_path: there is no reward model at './absent'",
    ),
    ("reward_model", {"template": "rekka"}, ".template is 'rekka'; it should be 'reka', 'chat_template'"),
    ("reward_model", {"micro_batch_tokens": "8"}, ".micro_batch_tokens is '8'; it should be a valid"),
    ("reward_model", {"micro_batch_tokens": 0}, ".micro_batch_tokens is 0; it should be greater than"),
    ("reward_model", {"mean": 0.5}, ": mean and std go together, but mean is 0.5 and std is None; "),
    ("reward_model", {"mean": 0.0, "std": 0}, ".std is 0; it should be greater than 0"),
    ("reward_model", {"device": "gpu"}, ": device is 'gpu'; it should be cpu, cuda or one GPU such as "),
    ("reward_model", {"dtype": "float16"}, ".dtype is 'float16'; it should be 'float32' or 'bfloat16'"),
    ("remote_reward_model", {"route": "clasify"}, ".route is 'clasify'; it should be 'classify'"),
    ("remote_reward_model", {"batch_size": "16"}, ".batch_size is '16'; it should be a valid "),
    ("remote_reward_model", {"batch_size": 0}, ".batch_size is 0; it should be greater than or "),
    ("remote_reward_model", {"concurrency": -1}, ".concurrency is -1; it should be greater "),
    ("remote_reward_model", {"request_timeout": 0}, ".request_timeout is 0; it should be great"),
    ("remote_reward_model", {"max_retries": -1}, ".max_retries is -1; it should be greater "),
    ("remote_reward_model", {"std": 0}, ".std is 0; it should be greater than 0"),
    ("remote_reward_model", {"mean": ".inf"}, ".mean is inf; it should be a finite number"),
    ("remote_reward_model", {"label": -1}, ".label is -1; it should be greater than or equal"),
    ("remote_reward_model", {"reasoning": "no"}, ".reasoning is 'no'; it should be a valid bool"),
    ("remote_reward_model", {"route": "score", "template": "reka"}, ": template is 'reka', which"),
    ("remote_reward_model", {"url": "127.0.0.1:9"}, ": the URL must begin with http:// or "),
    ("judge", {"base_url": 8000}, ".base_url is 8000; it should be a valid string"),
    ("judge", {"rubric": ""}, ".rubric is ''; it should have at least 1 character"),
    ("judge", {"rubric": " "}, ": rubric is empty; describe a good answer"),
    ("judge", {"concurrency": "4"}, ".concurrency is '4'; it should be a valid integer"),
    ("judge", {"concurrency": 0}, ".concurrency is 0; it should be greater than or equal to 1"),
    ("judge", {"max_tokens": 0}, ".max_tokens is 0; it should be greater than or equal to 1"),
    ("judge", {"scale": ["1", "10"]}, ".scale is ['1', '10']; it should be a valid number"),
    ("judge", {"scale": [1]}, ".scale is [1]; it should have at least 2 items, not 1"),
    ("judge", {"scale": [5, 1]}, ": scale is [5, 1]; it should be the lowest and the highest score, as in "),
    ("judge", {"scale": [3, 3]}, ": scale is [3, 3]; it should be the lowest and the highest score, as in "),
    ("judge", {"json_schema": "no"}, ".json_schema is 'no'; it should be a valid boolean"),
    ("judge", {"extra_body": "seed=1"}, ".extra_body is 'seed=1'; it should be a valid dictionary"),
    ("judge", {"prompt_price": -1, "completion_price": 1}, ".prompt_price is -1; it should be greater than "),
    ("judge", {"prompt_price": 1.0}, ": prompt_price and completion_price go together; set both or neither"),
    ("judge", {"api_key_env": "NOT_SET_ANYWHERE"}, ": the environment variable NOT_SET_ANYWHERE (api_key_env)"),
    # the user's own, annotated
    ("mine:brevity", {"limit": "50"}, ".limit is '50'; it should be a valid integer"),
    ("mine:brevity", {"limit": 2.5}, ".limit is 2.5; it should be a valid integer"),
    ("mine:brevity", {"strict": "no"}, ".strict is 'no'; it should be a valid boolean"),
    ("mine:brevity", {"words": "please"}, ".words is 'please'; it should be a valid list"),
    ("mine:brevity", {"bounds": [1, "2"]}, ".bounds is [1, '2']; it should be a valid tuple"),
    ("mine:trl", {"scale": "1"}, ".scale is '1'; it should be a valid number"),
    ("mine:trl", {"scale": -1}, ".scale is -1; it should be greater than 0"),
    ("mine:Starts", {"pattern": 1}, ".pattern is 1; it should be a valid string"),
    ("mine:Starts", {"pattern": "("}, ": '(' is not a pattern"),
    ("mine:Fields", {"limit": "1"}, ".limit is '1'; it should be a valid integer"),
    ("mine:late", {"limit": "1"}, ".limit is '1'; it should be a valid integer"),
]

RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("math_answer", {"weight": 1, "timeout": 3, "requires": ["reasoning_format"]}),
    ("math_answer", {"weight": -0.5, "timeout": None, "requires": "reasoning_format"}),
    ("exact_match", {"ignore_case": False}),
    ("numeric_close", {"rel_tol": 0, "abs_tol": 1}),
    ("regex", {"pattern": "Paris", "whole": True}),
    ("json_schema", {"schema": {"type": "object"}, "text_around": True}),
    ("json_schema", {"schema": "schema.json"}),
    ("repetition", {"ngram": 1}),
    ("language", {"language": "de", "max_other_script": 1}),
    ("length", {"max_length": 9, "buffer": 9}),
    ("length", {"max_length": 9, "shape": "cosine", "buffer": None}),
    ("instruction_following", {"partial_credit": True}),
    ("code_tests", {"time_limit": 1}),
    ("reasoning_gym", {"time_limit": 3, "memory_limit_mb": 512, "isolation": "namespaces"}),
    ("reward_model", {"mean": 0, "std": 2, "device": "cuda:1", "template": None}),
    ("remote_reward_model", {"template": "chat_template", "label": 0, "std": 0.5, "max_retries": 0}),
    ("judge", {"scale": [0, 1.5], "extra_body": {"seed": 1, "stop": ["x"]}, "prompt_price": 0, "completion_price": 1}),
    (
        "mine:brevity",
        {"limit": 5, "strict": True, "words": ["a"], "bounds": [1, 2], "anything": {"x": 1}, "where": "a/b"},
    ),
    ("mine:brevity", {"nothing": None}),
    ("mine:trl", {"scale": 2, "whatever": "x"}),
    ("mine:Starts", {"pattern": "a", "flags": "x"}),
    ("mine:Fields", {"limit": 1}),
    ("mine:late", {"limit": 1, "unknown": 5, "odd": 5}),
]

MINE = """
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from rekatrain.rewards import InputError, ParsedCompletion


def brevity(
    completion: ParsedCompletion,
    *,
    limit: int = 50,
    strict: bool = False,
    words: list[str] = [],
    bounds: tuple[int, int] = (0, 9),
    where: Path = Path(),
    nothing: int = None,
    anything=None,
) -> float:
    return 1.0


def trl(completions, scale: Annotated[float, Gt(0)] = 1.0, whatever=None, **kwargs):
    return [scale] * len(completions)


class Starts:
    def __init__(self, *, pattern: str, flags=None) -> None:
        try:
            re.compile(pattern)
        except re.error:
            raise InputError(f"{pattern!r} is not a pattern") from None

    def __call__(self, completion: ParsedCompletion) -> float:
        return 1.0


@dataclass
class Fields:
    limit: int = 1

    def __call__(self, completion: ParsedCompletion) -> float:
        return 1.0
"""
LATE = """
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nowhere import Unknown


def late(completion, *, limit: int = 1, unknown: Unknown = None, odd: 5 + 5 = None) -> float:
    return 1.0
"""


# Options that a reward must have, beside the one that a test is about.
NEEDED: dict[str, dict[str, object]] = {
    "judge": ENDPOINT,
    "remote_reward_model": SERVER,
    "reward_model": {"pretrained_model_name_or_path": "./model"},
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to work in, with the user's reward modules, rows and schemas; loading any weights fails the test."""
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "mine.py").write_text(f"{MINE}\n\nfrom late import late\n")
    (tmp_path / "five.json").write_text("5")
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)

    def load(*_: object, **__: object) -> None:
        pytest.fail("weights would be loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)


def write_recipe(rewards: Mapping[str, object], *, stage: str = "rloo") -> str:
    """Write a small recipe with these rewards and return its path; `.nan` and `.inf` are YAML's numbers."""
    recipe = {
        "stage": stage,
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": "./model", "dtype": "float32"},
        "dataset": {"path": "rows.jsonl"},
        "rloo": {"max_steps": 1, "num_generations": 2, "max_completion_length": 4},
        "sft": {"max_steps": 1},
        "rewards": rewards,
    }
    text = json.dumps(recipe)
    for number in (".nan", ".inf"):
        text = text.replace(f'"{number}"', number)
    Path("recipe.yaml").write_text(text)
    return "recipe.yaml"


def with_needed(reward: str, options: object) -> object:
    return {**NEEDED.get(reward, {}), **options} if isinstance(options, dict) else options


def rejected(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be rejected; return the rest of its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.count("\n") == 1 and message.startswith("rekatrain: error: "), message
    return message.removeprefix("rekatrain: error: ")


@pytest.mark.parametrize(("reward", "options", "message"), WRONG)
def test_options_wrong_one_is_one_line_and_exit_code_2(capsys, reward, options, message) -> None:
    recipe = write_recipe({"reasoning_format": None, reward: with_needed(reward, options)})
    expected = message if message.startswith("unknown key") else f"rewards.{reward}{message}"
    assert rejected(capsys, "train", recipe, "--dry-run").startswith(expected)


@pytest.mark.parametrize("command", ["train", "plan", "sample", "evaluate", "serve-rollouts"])
def test_options_are_checked_by_every_command(capsys, command) -> None:
    recipe = write_recipe({"regex": {"pattern": "Paris", "whole": "no"}})
    assert rejected(capsys, command, recipe) == "rewards.regex.whole is 'no'; it should be a valid boolean\n"


@pytest.mark.parametrize(("reward", "options"), RIGHT)
def test_options_right_ones_are_accepted(capsys, reward, options) -> None:
    rewards = {"reasoning_format": None, reward: with_needed(reward, options)}
    main(["train", write_recipe(rewards, stage="sft"), "--dry-run"])
    assert "# 1 rows" in capsys.readouterr().out
    built = build_reward_functions(rewards)[1]
    assert (built.weight, built.timeout) == (options.get("weight", 1.0), options.get("timeout") or built.timeout)


def test_options_every_built_in_reward_is_in_both_tables() -> None:
    has_options = {name for name in REWARDS if read_signature(name).options}
    assert has_options <= {reward for reward, _, _ in WRONG} and has_options <= {reward for reward, _ in RIGHT}
    assert len(WRONG) >= 40


def test_options_of_built_in_rewards_are_all_annotated() -> None:
    for name in REWARDS:
        for option, hint in read_signature(name).options.items():
            assert hint is not Any and not isinstance(hint, Unresolved), f"{name}.{option}"


def test_options_with_an_annotation_that_cannot_be_read_are_reported_once(caplog) -> None:
    compose._warn_unchecked.cache_clear()
    for _ in range(2):
        build_reward_functions({"mine:late": {"unknown": 5, "odd": 5}})
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "rewards.mine:late.unknown: its value is not checked, for its annotation cannot be read "
        "(NameError: name 'Unknown' is not defined)"
    )


def test_options_a_timeout_of_the_reward_itself_stands_where_the_recipe_has_none() -> None:
    for timeout, expected in ((None, 50.0), (9, 9.0)):
        options = {"time_limit": 1, "total_time_limit": 20, "timeout": timeout}
        assert build_reward_functions({"code_tests": options})[0].timeout == expected


def test_languages_are_those_that_py3langid_knows() -> None:
    known = LanguageIdentifier.from_model_file(MODEL_FILE).nb_classes
    assert {str(code) for code in known if len(code) == 2} == set(LANGUAGES.split())
