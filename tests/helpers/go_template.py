"""The part of Go's text/template that an Ollama Modelfile of an export uses, evaluated in Python.

No Go is needed to run the tests. The evaluator was compared with Go 1.19 on the conversations of test_modelfile.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(?P<left>- )?(?P<code>.*?)(?P<right> -)?\}\}", re.DOTALL)
WORD = re.compile(r"""\s*(?P<word>"(?:[^"\\]|\\.)*"|[()]|[^\s()]+)""")
SPACE = " \t\r\n"  # what a trim marker removes


@dataclass
class Node:
    """A piece of text, an expression, or an `if` or `range` with its branches."""

    kind: str
    code: str = ""
    body: "list[Node]" = field(default_factory=list)
    otherwise: "list[Node]" = field(default_factory=list)


def parse(source: str) -> list[Node]:
    """Return the nodes of a template."""
    pieces: list[tuple[str, str]] = []
    end, trim = 0, False
    for match in ACTION.finditer(source):
        text = source[end : match.start()]
        text = text.lstrip(SPACE) if trim else text
        pieces += [("text", text.rstrip(SPACE) if match["left"] else text), ("code", match["code"].strip())]
        end, trim = match.end(), match["right"] is not None
    pieces.append(("text", source[end:].lstrip(SPACE) if trim else source[end:]))
    nodes, closing = _parse(iter(pieces))
    assert closing == "", closing
    return nodes


def _parse(pieces: Iterator[tuple[str, str]]) -> tuple[list[Node], str]:
    """Return nodes up to an `else` or `end`, and that word; "" at the end of the template."""
    nodes: list[Node] = []
    for kind, code in pieces:
        keyword, _, rest = code.partition(" ")
        if kind == "text":
            nodes.append(Node("text", code))
        elif keyword in ("else", "end"):
            return nodes, code
        elif keyword in ("if", "range"):
            nodes.append(_branch(keyword, rest, pieces))
        else:
            nodes.append(Node("value", code))
    return nodes, ""


def _branch(keyword: str, code: str, pieces: Iterator[tuple[str, str]]) -> Node:
    node = Node(keyword, code)
    node.body, closing = _parse(pieces)
    if closing.startswith("else if "):
        node.otherwise = [_branch("if", closing.removeprefix("else if "), pieces)]
    elif closing == "else":
        node.otherwise, closing = _parse(pieces)
        assert closing == "end", closing
    else:
        assert closing == "end", closing
    return node


def render(source: str, data: dict[str, Any]) -> str:
    """Return the text of a template for `data`, whose lists hold dicts."""
    return _render(parse(source), data, {"$": data})


def _render(nodes: list[Node], dot: Any, variables: dict[str, Any]) -> str:
    text = ""
    for node in nodes:
        if node.kind == "text":
            text += node.code
        elif node.kind == "if":
            text += _render(node.body if _evaluate(node.code, dot, variables) else node.otherwise, dot, variables)
        elif node.kind == "range":
            names, _, code = node.code.partition(" := ")
            index, element = names.split(", ")
            for number, item in enumerate(_evaluate(code, dot, variables)):
                variables |= {index: number, element: item}
                text += _render(node.body, item, variables)
        elif assignment := re.fullmatch(r"(\$\w+) :?= (.*)", node.code):
            variables[assignment[1]] = _evaluate(assignment[2], dot, variables)
        else:
            text += str(_evaluate(node.code, dot, variables))
    return text


FUNCTIONS: dict[str, Any] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "len": len,
    "slice": lambda values, start: values[start:],
    "printf": lambda pattern, *values: pattern % values,
}


def _evaluate(code: str, dot: Any, variables: dict[str, Any]) -> Any:  # a value of the template
    words = [match["word"] for match in WORD.finditer(code)]
    value, rest = _call(words, dot, variables)
    assert not rest, rest
    return value


def _call(words: list[str], dot: Any, variables: dict[str, Any]) -> tuple[Any, list[str]]:
    """Evaluate a call, or a single value, up to a closing bracket."""
    head, values = words[0], []
    rest = words[1:] if head in FUNCTIONS else words
    while rest and rest[0] != ")":
        if rest[0] == "(":
            value, rest = _call(rest[1:], dot, variables)
            rest = rest[1:]
        else:
            value, rest = _value(rest[0], dot, variables), rest[1:]
        values.append(value)
    return (FUNCTIONS[head](*values) if head in FUNCTIONS else values[0]), rest


def _value(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1]
    if word.isdecimal():
        return int(word)
    name, _, key = word.partition(".")
    owner = variables[name] if name else dot
    return owner.get(key, "") if key else owner
