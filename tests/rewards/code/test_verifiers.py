"""The verifiers of reasoning_gym: answers that are code reach nothing, and change no verdict of another answer."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reasoning_gym

from rekatrain.data.chat import parse_completion
from rekatrain.rewards import InputError, build_reward_functions
from rekatrain.rewards.code.sandbox import _problem
from rekatrain.rewards.code.verifiers import ReasoningGym
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scorers.math_answer import math_answer
from rekatrain.rewards.scoring import ScoringConfig
from tests.rewards.code import users

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))

# Tasks whose verifiers call eval or sympy.parse_expr on the answer.
EVALUATING = (
    "string_insertion",
    "spiral_matrix",
    "binary_matrix",
    "n_queens",
    "countdown",
    "puzzle24",
    "polynomial_multiplication",
    "simple_integration",
    "intermediate_integration",
)


def entry_of(task: str) -> dict:
    """Return the first entry of a task."""
    return reasoning_gym.create_dataset(task, size=1, seed=3)[0]


def gold_of(task: str) -> str:
    """Return an answer with full marks; countdown and puzzle24 accept several."""
    return str(entry_of(task)["answer"])


def score(scorer: ReasoningGym, task: str, answer: str) -> float:
    """Score one answer to the first entry of a task."""
    return scorer(parse_completion(f"{answer} <sep>"), reasoning_gym_task=task, reasoning_gym_entry=entry_of(task))


@pytest.fixture(scope="module")
def scorer():
    made = ReasoningGym(time_limit=1.0)
    made.setup()
    yield made
    made.close()


def attack(path: Path) -> str:
    """Return an answer that writes a file."""
    return f"[open({str(path)!r}, 'w').write('x')]"


# What the attacks do outside a sandbox: in this process, and as a verifier runs them.
CONTROL = """
import json, sys
import reasoning_gym
for task, answer in json.loads(sys.stdin.read()).items():
    entry = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
    try:
        reasoning_gym.get_score_answer_fn(task)(answer, entry)
    except Exception:
        pass
"""


def test_reasoning_gym_attacks_write_files_without_a_sandbox(tmp_path: Path) -> None:
    """The attacks of the next test are real: each task's verifier runs its one."""
    attacks = json.dumps({task: attack(tmp_path / task) for task in EVALUATING})
    subprocess.run([sys.executable, "-c", CONTROL], input=attacks, text=True, check=True, timeout=120)
    assert sorted(os.listdir(tmp_path)) == sorted(EVALUATING)


def test_reasoning_gym_answers_write_no_files(tmp_path: Path) -> None:
    entries = [entry_of(task) for task in EVALUATING]
    answers = [attack(tmp_path / task) for task in EVALUATING]
    with Grader(build_reward_functions({"reasoning_gym": None}), ScoringConfig(num_workers=1)) as grader:
        scores = grader.score(
            prompts=["?"] * len(answers),
            completions=[f"{answer} <sep>" for answer in answers],
            completion_ids=[[1]] * len(answers),
            columns={"reasoning_gym_task": list(EVALUATING), "reasoning_gym_entry": entries},
        )
    assert os.listdir(tmp_path) == []
    assert scores.by_name["reasoning_gym"] == [0.0] * len(answers) and not any(scores.errors)


@pytest.mark.parametrize("task", EVALUATING)
def test_reasoning_gym_gives_golds_full_marks(scorer: ReasoningGym, task: str) -> None:
    assert score(scorer, task, gold_of(task)) == 1.0
    assert score(scorer, task, f"{gold_of(task)} 7") == 0.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[0 for _ in iter(int, 1)]", "no verdict after 1 seconds"),
        ("[__import__('signal').signal(15, 1), 9**9**9**9]", "no verdict after 1 seconds"),
        ("__import__('os')._exit(0)", r"the verifier died \(exit code 0\)"),
        ("__import__('ctypes').string_at(0)", r"the verifier died \(exit code -11\)"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", r"the verifier died \(exit code -9\)"),
    ],
)
def test_reasoning_gym_answer_that_ends_the_verifier_is_an_error(
    scorer: ReasoningGym, answer: str, message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(RewardError, match=message):
        score(scorer, "n_queens", answer)
    assert score(scorer, "n_queens", gold_of("n_queens")) == 1.0
    assert time.monotonic() - started < 4.0


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').kill(1, 9)",  # the process that imported reasoning_gym
        "__import__('os').kill(-1, 9)",
        "__import__('os').killpg(0, 9)",
        "[__import__('os').write(n, b'1\\n1\\n1\\n') for n in range(3, 5)]",
        "__import__('os').system('id')",
        "__import__('os').fork()",
        "__import__('os').setsid()",
        "exec('def f(): return f()\\nf()')",
        "__import__('socket').create_connection(('127.0.0.1', 22), 1)",
        "setattr(__import__('reasoning_gym').games.n_queens.NQueensDataset, 'score_answer', lambda *a: 1.0)",
        "__import__('builtins').__dict__.update(isinstance=lambda *a: 1/0)",
        "__import__('sys').modules.clear()",
        "__import__('os').close(0)",
        "raise SystemExit",
        "[].append(__import__('sys').exit())",
    ],
)
def test_reasoning_gym_answer_leaves_other_verdicts_alone(scorer: ReasoningGym, answer: str) -> None:
    for task in ("n_queens", "spiral_matrix"):
        with contextlib.suppress(RewardError):
            assert score(scorer, task, answer) in (0.0, 1.0)  # an answer can forge its own verdict, no other one
        assert score(scorer, task, "wrong") == 0.0
        assert score(scorer, task, gold_of(task)) == 1.0


def test_reasoning_gym_answer_sees_no_files_processes_or_secrets(
    scorer: ReasoningGym, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An answer that ends its process where a condition holds; the error shows that it does."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    secret = tmp_path / "secret"
    secret.write_text("x")
    exit_if = "__import__('os')._exit(7) if {} else ''"
    with pytest.raises(RewardError, match="exit code 7"):
        score(scorer, "n_queens", exit_if.format("True"))
    for condition in [
        "'HF_TOKEN' in __import__('os').environ",
        f"__import__('os').path.exists({str(secret)!r})",
        f"__import__('os').path.exists({str(Path(__file__))!r})",
        "__import__('os').path.exists('/proc/self')",
        "__import__('os').path.exists('/etc/passwd')",
        "'HF_TOKEN' in open('/proc/self/environ').read()",
        "__import__('os').fork() >= 0",
    ]:
        assert score(scorer, "n_queens", exit_if.format(condition)) == 0.0, condition


def test_reasoning_gym_restarts_a_sandbox_that_died(scorer: ReasoningGym) -> None:
    assert score(scorer, "countdown", gold_of("countdown")) == 1.0
    os.kill(jail_processes()[-1], 9)
    time.sleep(0.2)
    assert score(scorer, "countdown", gold_of("countdown")) == 1.0


def jail_processes() -> list[int]:
    """Return the ids of this process's servers of sandboxes, in the order of their start."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"jail.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_reasoning_gym_leaves_no_process_behind() -> None:
    before = users.sandbox_processes()
    made = ReasoningGym(memory_limit_mb=2048)
    made.setup()
    assert len(users.sandbox_processes() - before) >= 2
    made.close()
    users.wait_until_gone(before | {str(server) for server in jail_processes()})


def test_reasoning_gym_reports_a_broken_verifier_and_an_unknown_task(scorer: ReasoningGym) -> None:
    completion = parse_completion("2 × x <sep>")
    with pytest.raises(RewardError, match="verifier of prime_factorization: ValueError: invalid literal"):
        scorer(
            completion,
            reasoning_gym_task="prime_factorization",
            reasoning_gym_entry={"answer": "two", "metadata": {}},
        )
    with pytest.raises(
        RewardError, match="verifier of no_such_task: ValueError: Dataset 'no_such_task' not registered"
    ):
        scorer(completion, reasoning_gym_task="no_such_task", reasoning_gym_entry={"answer": "two"})


def test_reasoning_gym_rejects_a_machine_without_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = {"namespaces": "Operation not permitted: unshare", "rlimits": ""}
    monkeypatch.setattr("rekatrain.rewards.code.sandbox._problem", problem.__getitem__)
    with pytest.raises(InputError, match="^rewards.reasoning_gym: this machine cannot isolate .* isolation: rlimits"):
        build_reward_functions({"reasoning_gym": None})
    build_reward_functions({"reasoning_gym": {"isolation": "rlimits"}})


def test_reasoning_gym_works_with_rlimits() -> None:
    made = ReasoningGym(isolation="rlimits", time_limit=1.0)
    try:
        assert score(made, "n_queens", gold_of("n_queens")) == 1.0
        with pytest.raises(RewardError, match="no verdict"):
            score(made, "n_queens", "[0 for _ in iter(int, 1)]")
        assert score(made, "n_queens", "__import__('os').fork()") == 0.0
    finally:
        made.close()


@pytest.mark.parametrize(
    "frame", ["{}", r"\boxed{{{}}}", "The answer is {}", "1+{}", "${}$", r"\text{{{}}}", "1*({})", "1/{}"]
)
def test_math_answer_evaluates_no_text(tmp_path: Path, frame: str) -> None:
    """math_answer needs no sandbox: its parsers give none of the answer's names to Python."""
    path = tmp_path / "attacked"
    for code in (f"open('{path}','w')", f"__import__('os').mkdir('{path}')", f"exec(\"open('{path}','w')\")"):
        for gold in ("42", r"\frac{1}{2}", "x+1", r"\text{east}", "[1, 2)"):
            math_answer(parse_completion(f"{frame.format(code)} <sep>"), answer=gold)
    assert not path.exists()
