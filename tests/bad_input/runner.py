"""Run the cases: each through the command line's `main`, in this process, in a folder whose every byte is compared.

    python -m tests.bad_input          print the table of all groups, and each case that is not as it should be
    python -m tests.bad_input models   of one group

A group is a YAML file in cases/:

    recipe:   the recipe of base.yaml that `set` changes (default sft)
    command:  the command line; {recipe} stands for that recipe (default: train {recipe} --dry-run)
    cases:    a list of cases, each a mapping with `set` (one or several overrides), `text` (a whole recipe), `files`
              (name -> text), `model` (changes of a copy of the model, models.py), `recipe` or `command`; and `expect`:
              `accepted`, or words of the one line on stderr. A list [set, expect] is short for set and expect
    products: a list of {keys, values, expect}: a case for each key and each value; {key} in expect is the key
"""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekatrain.trainer.cli import main
from tests.bad_input.models import change_model
from tests.bad_input.workspace import make_workspace, read_yaml, snapshot

SECONDS = 60
ACCEPTED = "accepted"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A thing that a user may do, and the words of the line that it gets, or `accepted`."""

    group: str
    expect: str
    command: str
    recipe: str
    set: tuple[str, ...] = ()
    text: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    model: tuple[Any, ...] = ()
    is_repeated: bool = True

    def __str__(self) -> str:
        what = self.set or self.model or self.files or (self.text and self.text[:60]) or ""
        return f"{self.command} {what}"[:160]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a case: `kind` is as expected, or names the fault."""

    kind: str
    detail: str


def read_group(path: Path) -> list[Case]:
    """Return the cases of a file, with its products written out."""
    group = read_yaml(path)
    cases = []
    for entry in group.get("cases", []):
        cases.append({"set": entry[0], "expect": entry[1]} if isinstance(entry, list) else entry)
    for product in group.get("products", []):
        for key in product["keys"]:
            for value in product["values"]:
                shared = {name: item for name, item in product.items() if name in ("recipe", "command")}
                expect = product["expect"].replace("{key}", key)
                is_first = value == product["values"][0]
                cases.append({"set": f"{key}={value}", "expect": expect, "is_repeated": is_first, **shared})
    return [
        Case(
            group=path.stem,
            expect=case["expect"],
            command=case.get("command", group.get("command", "train {recipe} --dry-run")),
            recipe=case.get("recipe", group.get("recipe", "sft")),
            set=_as_tuple(case.get("set", ())),
            text=case.get("text"),
            files=case.get("files", {}),
            model=_as_tuple(case.get("model", ())),
            is_repeated=case.get("is_repeated", True),
        )
        for case in cases
    ]


def run_case(case: Case, folder: Path, models: Path) -> Outcome:
    """Run a case in an empty folder; a rejected dry run is repeated as a run, which must say the same.

    Of a product, the first value of each key is repeated.
    """
    make_workspace(folder, models, has_run="done" in f"{case.command} {case.set} {case.files}")
    for name, text in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    if case.text is not None:
        (folder / f"{case.recipe}.yaml").write_bytes(case.text.encode("utf-8", "surrogateescape"))
    if case.model:
        change_model(folder, models, case.model)
    arguments = [part.format(recipe=f"{case.recipe}.yaml") for part in case.command.split()] + list(case.set)
    outcome = _run(arguments, case.expect, folder)
    if outcome.kind == "rejected" and case.is_repeated and "--dry-run" in arguments:
        repeated = _run([part for part in arguments if part != "--dry-run"], case.expect, folder)
        if repeated != outcome:
            return Outcome(kind="dry run differs", detail=f"{outcome.detail!r}, then {repeated}")
    return outcome


def run_group(path: Path, folder: Path, models: Path) -> list[tuple[Case, Outcome]]:
    """Run all cases of a file, each in a separate folder below `folder`."""
    outcomes = []
    for number, case in enumerate(read_group(path)):
        workspace = folder / f"{path.stem}-{number}"
        workspace.mkdir(parents=True)
        outcomes.append((case, run_case(case, workspace, models)))
        shutil.rmtree(workspace)
    return outcomes


def _run(arguments: list[str], expect: str, folder: Path) -> Outcome:
    """Run one command; the kind is accepted, rejected, or one of the faults."""
    before = snapshot(folder)
    stdout, stderr = io.StringIO(), io.StringIO()
    status: object = 0
    with _inside(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            with _deadline():
                main(arguments)
        except SystemExit as stop:
            status = stop.code
        except BaseException:  # a traceback is what the case looks for
            return Outcome(kind="traceback", detail=traceback.format_exc().strip().splitlines()[-1])
    # The loader's bar is no line: a model whose weights are not finite is found when they are loaded.
    shown = re.sub(r"\r?Loading weights:[^\r\n]*[\r\n]?", "", stderr.getvalue())
    lines = [line for line in shown.splitlines() if line.strip()]
    after = snapshot(folder)
    changed = [name for name in before.keys() | after.keys() if before.get(name, 0) != after.get(name, 0)]
    if changed:
        return Outcome(kind="files changed", detail=", ".join(sorted(changed)[:4]))
    if status == 0:
        return Outcome(kind="accepted" if expect == ACCEPTED else "silently accepted", detail="")
    message = lines[-1] if lines else ""
    # argparse prints the usage of the command before its line.
    is_one_line = len(lines) == 1 or (bool(lines) and lines[0].startswith("usage: "))
    if status != 2 or not is_one_line or "error: " not in message:
        return Outcome(kind="unclear", detail=f"status {status}: {stderr.getvalue()[-300:]!r}")
    if expect == ACCEPTED or not re.search(re.escape(expect), message):
        return Outcome(kind="other words", detail=message)
    return Outcome(kind="rejected", detail=message)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder; forget what it adds to sys.path and the modules of it."""
    here, path, modules = Path.cwd(), list(sys.path), set(sys.modules)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Raise TimeoutError in a case that does not end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end within {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _as_tuple(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
