"""Damage the newest checkpoint, the records and the recipe of a run in every way: each is repaired or reported.

    python tests/chaos/damage.py

The run is killed after its third checkpoint of four. Each file of the checkpoint is truncated, emptied, deleted, and so
on. A resume must do one of these:

    falls back   it names the damaged file, goes on from the checkpoint before, and ends as the undamaged run
    goes on      nothing that is read is damaged: it ends as the undamaged run
    reports      records are gone: it says so, and ends as the undamaged run but for the records
    one line     it cannot go on, and says in one line with exit status 2 what is wrong

Runs are compared bit by bit. Exits with 1 after a traceback, or if a result differs without a word.
"""

import argparse
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import fork_run
from runs import Setting, all_settings, differences, scratch_folder, write_model, write_workspace

Damage = Callable[[Path], object]
RESULTS = ("falls back", "goes on", "reports", "one line")
NEWEST, BEFORE = "checkpoint-3", "checkpoint-2"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A damage, and the outcome that it must have.

    damage:  changes a run folder
    message: a pattern of the line that reports it
    """

    name: str
    damage: Damage
    outcome: str
    message: str = ""


def truncate(path: Path) -> None:
    """Cut off the second half."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Put the file of the checkpoint before in its place; the first bytes of a file that is the same in both change."""
    other = path.parents[1] / BEFORE / path.name
    if other.read_bytes() == path.read_bytes():
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    else:
        shutil.copyfile(other, path)


def make_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def make_endless_link(path: Path) -> None:
    """Put a link to itself in the place of a file."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGES: dict[str, Damage] = {
    "truncated": truncate,
    "bit flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "of another step": swap,
    "garbage": lambda path: path.write_bytes(b"\x80garbage\xff" * 9),
    "NULs": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "a folder": make_folder,
    "a link to itself": make_endless_link,
    "unreadable": lambda path: path.chmod(0),
}


def checkpoint_cases(newest: Path, every: int, first: int) -> Iterator[Case]:
    """Yield damages of each file of a checkpoint; each file gets each `every`-th damage."""
    names = sorted(path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        for index, (kind, damage) in enumerate(DAMAGES.items()):
            if (number + index + first) % every == 0:
                yield Case(
                    name=f"{name}: {kind}",
                    damage=_at(f"checkpoints/{NEWEST}/{name}", damage),
                    outcome="falls back",
                    message=rf"skipped .*{NEWEST}: .*{re.escape(Path(name).name)}",
                )


def record_cases(stage: str) -> Iterator[Case]:
    """Yield damages of the records; lines of steps that are repeated do not count."""
    reported: dict[str, Damage] = {
        "deleted": Path.unlink,
        "emptied": lambda path: path.write_bytes(b""),
        "torn": truncate,
        "cut at the end of a line": lambda path: path.write_bytes(path.read_bytes().splitlines(True)[0]),
        "a changed digit": lambda path: path.write_bytes(path.read_bytes().replace(b".1", b".2")),
        "garbage in a line": lambda path: path.write_bytes(b"\xff\0" + path.read_bytes()),
        "not UTF-8": lambda path: path.write_bytes(path.read_bytes().replace(b'"step"', b'"st\xe9p"', 1)),
        "a line without a step": lambda path: path.write_bytes(path.read_bytes().replace(b'"step"', b'"stop"', 1)),
    }
    repaired: dict[str, Damage] = {
        "NULs at the end": lambda path: path.write_bytes(path.read_bytes() + bytes(100)),
        "half a line at the end": lambda path: path.write_bytes(path.read_bytes() + b'{"step": 4, "los'),
        "doubled": lambda path: path.write_bytes(path.read_bytes() * 2),
    }
    refused: dict[str, Damage] = {"a folder": make_folder, "unreadable": DAMAGES["unreadable"]}
    for name in ("metrics.jsonl", "rollouts.jsonl")[: 1 + (stage == "rloo")]:
        for damages, outcome in ((reported, "reports"), (repaired, "goes on"), (refused, "one line")):
            for kind, damage in damages.items():
                message = "" if outcome == "goes on" else re.escape(name)
                yield Case(name=f"{name}: {kind}", damage=_at(name, damage), outcome=outcome, message=message)


def recipe_cases() -> Iterator[Case]:
    """Yield damages of the stored recipe."""
    for kind, damage in DAMAGES.items():
        if kind not in ("bit flipped", "of another step", "longer"):  # it may be a valid recipe still, or is none
            yield Case(
                name=f"recipe.yaml: {kind}",
                damage=_at("recipe.yaml", damage),
                outcome="one line",
                message="recipe.yaml",
            )


def folder_cases() -> Iterator[Case]:
    """Yield damages of whole folders."""
    newest = f"checkpoints/{NEWEST}"
    one_line: dict[str, tuple[str, Damage]] = {
        "every manifest truncated": (f"{NEWEST}: its manifest.json is damaged.*checkpoint-1: its", _at_each(truncate)),
        "every manifest deleted": (f"{NEWEST}: it has no manifest.json.*checkpoint-1: it", _at_each(Path.unlink)),
        "checkpoints a file": ("checkpoints", _at("checkpoints", make_file)),
        "checkpoints a dangling link": ("checkpoints", _at("checkpoints", make_link)),
        "checkpoints read-only": ("checkpoints", _at("checkpoints", lambda path: path.chmod(0o555))),
        "run folder read-only": ("cannot be written", _at(".", lambda path: path.chmod(0o555))),
    }
    fall_back: dict[str, Damage] = {
        "checkpoint empty": _at(newest, lambda path: (shutil.rmtree(path), path.mkdir())),
        "checkpoint unreadable": _at(newest, lambda path: path.chmod(0)),
        "checkpoint of another step": _at(newest, copy_before),
    }
    for name, (message, damage) in one_line.items():
        yield Case(name=name, damage=damage, outcome="one line", message=message)
    for name, damage in fall_back.items():
        yield Case(name=name, damage=damage, outcome="falls back", message=f"skipped .*{NEWEST}")


def harmless_cases() -> Iterator[Case]:
    """Yield changes that damage nothing: the user's own files, a wrong clock, and half a checkpoint of a killed run."""
    newest = f"checkpoints/{NEWEST}"
    yield Case(name="clock a day back", damage=turn_back_the_clock, outcome="goes on")
    partial_folder = "checkpoints/.rekatrain-partial/checkpoint-4"
    yield Case(
        name="half a checkpoint", damage=_at(partial_folder, lambda path: path.mkdir(parents=True)), outcome="goes on"
    )
    for name in (
        "notes.txt",
        ".hidden",
        "extra.pt",
        "pytorch_model.bin",
        "adapter_model.bin",
        "pytorch_model.bin.index.json",
    ):
        write: Damage = lambda path: path.write_text("the user's")  # noqa: E731
        yield Case(
            name=f"the user's {name} in the checkpoint", damage=_at(f"{newest}/{name}", write), outcome="goes on"
        )


def make_file(folder: Path) -> None:
    """Put an empty file in the place of a folder."""
    shutil.rmtree(folder)
    folder.write_text("")


def make_link(folder: Path) -> None:
    """Put a link to nothing in the place of a folder."""
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def copy_before(newest: Path) -> None:
    """Put a copy of the checkpoint before in the place of the newest one."""
    shutil.rmtree(newest)
    shutil.copytree(newest.with_name(BEFORE), newest)


def turn_back_the_clock(run: Path) -> None:
    """Give every file a time in the future."""
    for path in [run, *run.rglob("*")]:
        os.utime(path, (time.time() + 86400,) * 2)


def _at(name: str, damage: Damage) -> Damage:
    return lambda run: damage(run / name)


def _at_each(damage: Damage) -> Damage:
    return lambda run: [damage(path) for path in (run / "checkpoints").glob("checkpoint-*/manifest.json")]


def cases(setting: Setting, newest: Path, every: int, first: int) -> list[Case]:
    """Return the cases of a setting; the damages that do not depend on the weights are tried with adapters alone."""
    others = [*record_cases(setting.stage), *recipe_cases(), *folder_cases()] if setting.form == "lora" else []
    others += harmless_cases()
    stride = max(1, every // 4)
    return [*checkpoint_cases(newest, every, first), *others[first % stride :: stride]]


class Workshop:
    """The run of a setting, complete and killed, and copies of it that are damaged."""

    def __init__(self, folder: Path, model: Path, setting: Setting) -> None:
        self.folder = folder / str(setting).replace(" ", "-")
        workspace = write_workspace(self.folder / "whole", model, setting, save_total_limit=None)
        process = fork_run(workspace)
        if process.wait() != 0:
            raise RuntimeError(f"{setting}: the undamaged run failed:\n{process.output()[-3000:]}")
        self.whole = workspace / "run"
        self.killed = shutil.copytree(workspace, self.folder / "killed")
        shutil.rmtree(self.killed / "run" / "checkpoints" / "checkpoint-4")
        self.number = 0

    def outcome(self, case: Case) -> str:
        """Return the outcome of a resume after a damage, or what is wrong with it."""
        self.number += 1
        folder = shutil.copytree(self.killed, self.folder / f"case-{self.number}", symlinks=True)
        run = folder / "run"
        case.damage(run)
        process = fork_run(folder, "--resume")
        status, output = process.wait(), process.output()
        if "Traceback" in output:
            return f"TRACEBACK: {output.strip().splitlines()[-1][:200]}"
        errors = [line for line in output.splitlines() if line.startswith("rekatrain: error: ")]
        if status != 0:
            result = "one line" if status == 2 and len(errors) == 1 and output.endswith(f"{errors[0]}\n") else "UNCLEAR"
            shown = errors[0] if errors else output[-300:]
        else:
            shown = " / ".join(line for line in output.splitlines() if line.startswith(("skipped", "run/")))
            result = self._compare(run, shown)
        if not re.search(case.message, shown):
            return f"{result}, but the line does not say it: {shown[:300]}"
        return result

    def _compare(self, run: Path, shown: str) -> str:
        found = list(differences(self.whole, run))
        left = [
            name for name in found if name.endswith("is left over") and "checkpoint-3" in name
        ]  # the user's, or moved
        others = [name for name in found if name not in left]
        if "skipped" in shown:
            return "falls back" if not others else f"SILENTLY DIFFERENT: {others[:3]}"
        if others and all("jsonl" in name for name in others) and "jsonl" in shown:
            return "reports"
        if others:
            return f"SILENTLY DIFFERENT: {others[:3]}"
        return "reports" if "jsonl" in shown else "goes on"


def main() -> None:
    """Try the cases, and print each and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=4, help="damage each file in each n-th way; above 7, fewer others")
    options = parser.parse_args()
    folder = scratch_folder()
    model = write_model(folder / "model")
    started, counts, num_bad = time.monotonic(), Counter[tuple[str, str]](), 0
    for number, setting in enumerate(all_settings(1)):
        workshop = Workshop(folder, model, setting)
        newest = workshop.killed / "run" / "checkpoints" / NEWEST
        for case in cases(setting, newest, options.every, number):
            outcome = workshop.outcome(case)
            is_good = outcome == case.outcome
            num_bad += not is_good
            counts[str(setting), outcome if outcome in RESULTS else "WRONG"] += 1
            wanted = "" if is_good else f"   <-- expected: {case.outcome}; see {workshop.folder}/case-{workshop.number}"
            print(f"{setting!s:<10} {case.name:<55} {outcome}{wanted}", flush=True)
    columns = [*RESULTS, "WRONG"]
    print(f"\n{'setting':<12}" + "".join(f"{name:>12}" for name in columns))
    for setting in all_settings(1):
        print(f"{setting!s:<12}" + "".join(f"{counts[str(setting), name]:>12}" for name in columns))
    total = sum(counts.values())
    print(f"{total} cases, {num_bad} other than expected; {time.monotonic() - started:,.0f} s")
    if num_bad:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
