"""Random text as a prompt or a completion, random rows, and random damage of a checkpoint."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rekatrain.data.chat import check_messages, parse_completion, parse_prompt, render_completion, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.trainer.run.checkpoints import MANIFEST_FILE, find_fault, read_manifest, seal

MANY = settings(max_examples=200, deadline=None, derandomize=True)
FEW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PIECES = st.sampled_from(
    [
        "human:",
        "assistant:",
        "system:",
        " <sep> ",
        "<sep>",
        "<reasoning>",
        "</reasoning>",
        "\n",
        " ",
        "a",
        "<|endoftext|>",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}), max_size=5
)


@MANY
@given(text=TEXTS)
def test_completion_of_any_text_parses_and_renders_again(text: str) -> None:
    parsed = parse_completion(text)
    again = parse_completion(render_completion(parsed.reasoning, parsed.answer))
    assert (again.reasoning, again.answer) == (parsed.reasoning, parsed.answer)


@MANY
@given(text=TEXTS)
def test_prompt_of_any_text_parses_or_is_rejected(text: str) -> None:
    try:
        messages = parse_prompt(text)
    except InputError:
        return
    assert all(message["role"] and isinstance(message["content"], str) for message in messages)


@MANY
@given(messages=MESSAGES)
def test_prompt_that_passes_the_checks_is_read_back(messages: list[Any]) -> None:
    assume(not messages or messages[-1]["role"] != "assistant")  # a prompt ends before the model's turn
    try:
        check_messages(messages)
        prompt = render_prompt(messages)
    except InputError:
        return
    assert render_prompt(parse_prompt(prompt)) == prompt


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sealed checkpoint of three files."""
    folder = tmp_path / "checkpoint-3"
    (folder / "inner").mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "inner/optim.pt"):
        (folder / name).write_bytes(name.encode() * 5)
    seal(folder, step=3, stage="sft", launch={"engine": "single", "zero_stage": None, "num_processes": 1})
    assert find_fault(folder) is None
    return folder


@FEW
@given(data=st.data())
def test_any_damage_of_a_checkpoint_is_a_fault(checkpoint: Path, data: st.DataObject) -> None:
    damaged = checkpoint.with_name("work") / checkpoint.name
    shutil.rmtree(damaged.parent, ignore_errors=True)
    shutil.copytree(checkpoint, damaged)
    path = data.draw(st.sampled_from(sorted(path for path in damaged.rglob("*") if path.is_file())))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                content[:position],
                content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :],
                content + b"\n{",
                b"\0" * len(content),
                None,
            ]
        )
    )
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    assert find_fault(damaged) is not None
    if path.name != MANIFEST_FILE:
        assert path.relative_to(damaged).as_posix() in str(find_fault(damaged))


@FEW
@given(body=st.dictionaries(st.sampled_from(["step", "stage", "files", "launch"]), JSON) | JSON)
def test_manifest_of_any_content_is_read_or_rejected(checkpoint: Path, body: Any) -> None:
    if isinstance(body, dict):  # with the digest of a whole one
        body = {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(body), encoding="utf-8")
    fault = find_fault(checkpoint)
    assert fault is None or isinstance(fault, str)
    if fault is not None and "manifest.json is damaged" in fault:
        with pytest.raises(ValueError, match="is damaged"):
            read_manifest(checkpoint)
