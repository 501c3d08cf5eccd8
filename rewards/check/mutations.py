"""Wrong answers made from right ones, by which `rekatrain check-rewards` looks for a reward that is too lenient.

A mutation may by chance make another right answer (`-0` for `0`), so the ones that pass are to be read, not counted.
"""

import re

NUMBER = re.compile(r"\d+")
BOX = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)
FENCE = re.compile(r"```python\n(.*)\n```", re.DOTALL)
POINT = re.compile(r"\(([^(),]+),([^(),]+)\)")
# Operators of a program, each with one that computes something else.
OPPOSITES = (("==", "!="), (" + ", " - "), (" - ", " + "), ("<", ">"), (">", "<"), (" * ", " + "), (" and ", " or "))


def wrong_answers(gold: str, other: str | None) -> dict[str, str]:
    """Return wrong answers by the name of their mutation; those that a gold does not allow are left out.

    other: the gold of another row, if there is one that differs

    >>> wrong_answers("\\\\boxed{42}", "\\\\boxed{7}")["sign changed"]
    '\\\\boxed{-42}'
    """
    for pattern, mutate in ((FENCE, _of_code), (BOX, _of_text)):
        if match := pattern.fullmatch(gold):
            start, end = match.span(1)
            inside = {name: f"{gold[:start]}{text}{gold[end:]}" for name, text in mutate(match[1]).items()}
            break
    else:
        inside = _of_text(gold)
    answers = {"another row's gold": other or "", **inside}
    if not FENCE.fullmatch(gold):
        second = other or inside.get("digit changed")
        answers["two answers"] = f"{gold} or maybe {second}" if second else ""
    return {"empty": "", **{name: text for name, text in answers.items() if text.strip() and text != gold}}


def _of_text(text: str) -> dict[str, str]:
    numbers = list(NUMBER.finditer(text))
    answers = {"truncated": text[: len(text) // 2].rstrip()}
    if numbers:
        first, last = numbers[0], numbers[-1]
        answers["digit changed"] = text[: last.end() - 1] + str((int(last[0][-1]) + 1) % 10) + text[last.end() :]
        if set(text) & set("123456789"):
            answers["sign changed"] = text[1:] if text.startswith("-") else f"-{text}"
        answers["reordered"] = text[: first.start()] + first[0][::-1] + text[first.end() :]
    if point := POINT.search(text):
        answers["reordered"] = f"{text[: point.start()]}({point[2].strip()}, {point[1].strip()}){text[point.end() :]}"
    elif not numbers and len(text.split()) > 1:
        answers["reordered"] = " ".join(reversed(text.split()))
    return {name: answer for name, answer in answers.items() if answer != text}


def _of_code(code: str) -> dict[str, str]:
    lines = code.split("\n")
    answers = {"truncated": "\n".join(lines[: len(lines) // 2])}
    numbers = list(NUMBER.finditer(code))
    if numbers:
        last = numbers[-1]
        answers["digit changed"] = f"{code[: last.start()]}{int(last[0][-9:]) + 1}{code[last.end() :]}"
    for one, opposite in OPPOSITES:
        if one in code:
            answers["sign changed"] = code.replace(one, opposite, 1)
            break
    if len(lines) > 2:
        answers["reordered"] = "\n".join([*lines[:-2], lines[-1], lines[-2]])
    return {name: answer for name, answer in answers.items() if answer != code}
