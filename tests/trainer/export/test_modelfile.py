"""The Ollama Modelfile of a GGUF export: its template renders the chat format, and its settings are the export's.

Ollama itself is not run: it is no Python package. Its rules for templates are in its template/template.go: messages of
one role in a row are joined by two line ends before the template sees them.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from string import Template
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.data.chat import Message, render_prompt
from rekatrain.trainer.export.serving import TEMPLATES
from tests.conftest import GOLDEN
from tests.helpers.go_template import render

VALUES = {
    "file": "model-q4_k_m.gguf",
    "shell_name": "sums",
    "modelfile": "Modelfile-q4_k_m",
    "max_length": "2048",
    "bos": "",
}
MODELFILE = Template((TEMPLATES / "Modelfile").read_text(encoding="utf-8")).substitute(VALUES)
SOURCE = MODELFILE.split('TEMPLATE """')[1].split('"""')[0]
TEXTS = st.text(alphabet='ab \n{}.$"é', max_size=8)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS})
GO = """package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	source, _ := os.ReadFile(os.Args[1])
	var messages []map[string]string
	json.NewDecoder(os.Stdin).Decode(&messages)
	data := map[string]any{"Messages": messages}
	template.Must(template.New("").Option("missingkey=zero").Parse(string(source))).Execute(os.Stdout, data)
}
"""


def as_ollama(messages: list[Message], thinking: str = "") -> list[dict[str, str]]:
    """Return the messages as a template of Ollama sees them; a client's own `human` is one role more."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"] != "tool":
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"], "Thinking": ""})
    joined[-1]["Thinking"] = thinking
    return joined


def is_joined(messages: list[Message]) -> bool:
    return len(as_ollama(messages)) < len(messages)


def test_modelfile_renders_the_golden_prompts() -> None:
    golden = json.loads((GOLDEN / "reka_prompts.json").read_text(encoding="utf-8"))
    rendered = 0
    for case in golden:
        messages = case["messages"]
        # Ollama always asks for an answer; a reasoning is in the field Thinking, not in the content.
        has_reasoning = any("<reasoning>" in message["content"] for message in messages)
        if case["add_generation_prompt"] and not has_reasoning and not is_joined(messages):
            assert render(SOURCE, {"Messages": as_ollama(messages)}) == case["text"], case["name"]
            rendered += 1
    assert rendered >= 7


@given(st.lists(MESSAGES, min_size=2, max_size=5))
def test_modelfile_renders_conversations_as_we_do(messages: list[Message]) -> None:
    joined: list[Message] = [{"role": turn["Role"], "content": turn["Content"]} for turn in as_ollama(messages)]
    if len(joined) > 1 or joined[0]["role"] != "system":
        assert render(SOURCE, {"Messages": as_ollama(messages)}) == render_prompt(joined)


def test_modelfile_leaves_out_earlier_reasoning_alone() -> None:
    turns = [{"role": "user", "content": "3 + 3 ="}, {"role": "assistant", "content": "6"}]
    opened = render(SOURCE, {"Messages": as_ollama(turns, "Twice 3.")})
    assert opened == "human: 3 + 3 = <sep> assistant: <reasoning>\nTwice 3.\n</reasoning>\n\n6"
    earlier: list[dict[str, Any]] = [*as_ollama(turns, "Twice 3."), *as_ollama([{"role": "user", "content": "And 4?"}])]
    assert (
        render(SOURCE, {"Messages": earlier})
        == "human: 3 + 3 = <sep> assistant: 6 <sep> human: And 4? <sep> assistant:"
    )


def test_modelfile_has_tags_that_ollama_infers() -> None:
    # Its thinking/template.go takes the first and the last text beside the field, without white space around them.
    block = re.search(r"\.Thinking -\}\}(.*?)\{\{ \.Thinking \}\}(.*?)\{\{ end", SOURCE, re.DOTALL)
    assert block is not None and [text.strip() for text in block.groups()] == ["<reasoning>", "</reasoning>"]


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go is installed")
def test_modelfile_renders_by_go_itself(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    (tmp_path / "template").write_text(SOURCE)
    golden = json.loads((GOLDEN / "reka_prompts.json").read_text(encoding="utf-8"))
    conversations = [case["messages"] for case in golden]
    conversations += [[{"role": "system", "content": ""}, {"role": "user", "content": " a {{ .b }}\n"}]]
    for messages in conversations:
        for thinking in ("", "Why?"):
            turns = as_ollama(messages, thinking)
            command = ["go", "run", "main.go", "template"]
            done = subprocess.run(command, cwd=tmp_path, input=json.dumps(turns), capture_output=True, text=True)
            assert done.stdout == render(SOURCE, {"Messages": turns}), done.stderr
