"""The ways of damaging a run folder, and the outcome that each must have."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rekatrain.trainer.run.checkpoints import MANIFEST_FILE
from tests.chaos.runs import Setting

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
            if (number + index + first) % every == 0 and (name, kind) != (MANIFEST_FILE, "longer"):  # white space
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
    write: Damage = lambda path: path.write_text("the user's")  # noqa: E731
    for name in ("notes.txt", ".hidden", "extra.pt"):
        yield Case(name=f"the user's {name}", damage=_at(f"{newest}/{name}", write), outcome="goes on")
    for name in ("pytorch_model.bin", "adapter_model.bin", "pytorch_model.bin.index.json"):
        damage = _at(f"{newest}/{name}", write)
        yield Case(name=f"a foreign {name}", damage=damage, outcome="falls back", message=f"skipped .*{name} was not")


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
