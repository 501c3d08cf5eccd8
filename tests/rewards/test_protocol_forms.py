"""Reward functions of every form that TRL calls, and of every way to end or move the process: values or errors."""

# ruff: noqa: E501
# A function in the module is read as one line.

from pathlib import Path

import pytest

from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig

MODULE = """
import os, sys, signal, asyncio, functools
import numpy as np
def n(c): return len(c)
def kw_only(*, completions, **kwargs): return [1.0]*n(completions)
def pos(prompts, completions, **kwargs): return [1.0]*n(completions)
def ids(completion_ids, **kwargs): return [float(len(i)) for i in completion_ids]
def np_float(completions, **kwargs): return [np.float32(1.0)]*n(completions)
def np_array(completions, **kwargs): return np.ones(n(completions))
def tensor(completions, **kwargs):
    import torch
    return torch.ones(n(completions))
def tensors(completions, **kwargs):
    import torch
    return [torch.tensor(1.0)]*n(completions)
def ints(completions, **kwargs): return [1]*n(completions)
def bools(completions, **kwargs): return [True]*n(completions)
def nones(completions, **kwargs): return [None]*n(completions)
def tuple_(completions, **kwargs): return tuple([1.0]*n(completions))
async def co(completions, **kwargs):
    await asyncio.sleep(0); return [1.0]*n(completions)
def column(completions, answer, **kwargs): return [float(len(a)) for a in answer]
def conv(completions, **kwargs): return [1.0 if c[0]["content"] else 0.0 for c in completions]
def conv_prompt(prompts, completions, **kwargs): return [1.0 if p[-1]["role"]=="user" and c[0]["role"]=="assistant" else 0.0 for p,c in zip(prompts,completions)]
def state(completions, trainer_state, **kwargs): return [float(trainer_state.global_step)+trainer_state.max_steps*0]*n(completions)
def metric(completions, log_metric=None, log_extra=None, **kwargs):
    log_metric("m", 2.0); log_extra("x", [c[:1] for c in completions]); return [1.0]*n(completions)
class Callable_:
    def __call__(self, completions, **kwargs): return [1.0]*n(completions)
part = functools.partial(lambda completions, k, **kwargs: [k]*len(completions), k=1.0)
lam = lambda completions, **kwargs: [1.0]*len(completions)
# must be errors, and the process lives on in the same place
def sysexit(completions, **kwargs): sys.exit(3)
def osexit(completions, **kwargs): os._exit(3)
def abort(completions, **kwargs): os.abort()
def genexit(completions, **kwargs): raise GeneratorExit
def stopit(completions, **kwargs): raise StopIteration
def killpg(completions, **kwargs): os.killpg(os.getpgid(0), signal.SIGKILL)
def killpg0(completions, **kwargs): os.killpg(0, 15)
def kill0(completions, **kwargs): os.kill(0, 15)
def execv(completions, **kwargs): os.execv("/bin/true", ["true"])
def closerange(completions, **kwargs): os.closerange(3, 64); return [1.0]*n(completions)
def str_(completions, **kwargs): return ["1"]*n(completions)
def nan(completions, **kwargs): return [float("nan")]*n(completions)
def inf(completions, **kwargs): return [float("inf")]*n(completions)
def nested(completions, **kwargs): return [[1.0]]*n(completions)
def cplx(completions, **kwargs): return [1j]*n(completions)
def huge(completions, **kwargs): return [10**400]*n(completions)
def chdir(completions, **kwargs): os.chdir("/tmp"); return [1.0]*n(completions)
def fchdir(completions, **kwargs): 
    fd=os.open("/", os.O_RDONLY); os.fchdir(fd); os.close(fd); return [1.0]*n(completions)
def mutate(completions, prompts, completion_ids, answer, **kwargs):
    answer[0]="CHANGED"; completions[0]="CHANGED"; prompts[0]="CHANGED"; completion_ids[0].append(7); return [1.0]*n(completions)
def after(completions, answer, completion_ids, **kwargs): return [float("CHANGED" in completions or "CHANGED" in answer or 7 in completion_ids[0])]*n(completions)
def fork(completions, **kwargs):
    if os.fork()==0: os._exit(0)
    return [1.0]*n(completions)
# scorers
def s_plain(completion): return 1.0
def s_len(completion, *, answer): return float(len(answer))
def s_exit(completion): sys.exit(0)
def s_osexit(completion): os._exit(0)
def s_killpg(completion): os.killpg(0, 9)
def s_chdir(completion): os.chdir("/"); return 1.0
def s_str(completion): return "1"
def s_thread(completion):
    import threading,time
    threading.Thread(target=lambda: time.sleep(30)).start(); return 1.0
def s_close(completion): os.closerange(0, 100); return 1.0
def s_segv(completion):
    import ctypes; ctypes.string_at(0)
def s_np(completion): return np.float64(1.0)
def s_bool(completion): return True
def s_none(completion): return None
"""
# What each gives for two completions; None: it does not apply.
ONES = [
    *(
        "kw_only",
        "pos",
        "np_float",
        "np_array",
        "tensor",
        "tensors",
        "ints",
        "bools",
        "tuple_",
        "co",
        "conv",
        "conv_prompt",
    ),
    *("metric", "Callable_", "part", "lam", "column", "chdir", "fchdir", "mutate", "fork"),
    *("s_plain", "s_np", "s_bool", "s_chdir", "s_thread", "s_len"),
]
VALUES: dict[str, float | None] = {
    **dict.fromkeys(ONES, 1.0),
    **{"ids": 2.0, "state": 0.0, "after": 0.0, "nones": None, "s_none": None},
}
FAILING = [
    *("sysexit", "osexit", "abort", "genexit", "stopit", "killpg", "killpg0", "kill0", "execv", "closerange", "str_"),
    *("nan", "inf", "nested", "cplx", "huge", "s_exit", "s_osexit", "s_killpg", "s_str", "s_close", "s_segv"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "forms_of_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_functions_of_every_form_score_or_fail_alone(folder: Path) -> None:
    functions = build_reward_functions({f"forms_of_rewards:{name}": None for name in (*VALUES, *FAILING)})
    with Grader(functions, ScoringConfig(num_workers=1, max_error_share=1.0, timeout=10.0)) as grader:
        scores = grader.score(
            prompts=["human: a <sep> assistant:"] * 2,
            completions=[" <reasoning>\nx\n</reasoning>\n\ny <sep>", " b <sep>"],
            completion_ids=[[1, 2], [1, 2]],
            columns={"answer": ["q", "r"]},
        )
    found = {name.partition(":")[2]: values for name, values in scores.by_name.items()}
    assert {name: found[name] for name in VALUES} == {name: [value, value] for name, value in VALUES.items()}
    failed = {name.partition(":")[2] for errors in scores.errors for name in errors}
    assert failed == set(FAILING)
    assert Path.cwd() == folder
