"""Forms of judging: thoughts before the verdict, both orders, and templates of generative reward models."""

import asyncio
import contextlib
import json

import pytest

from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.judge import Judge
from rekatrain.rewards.models.judge_forms import TemplateForm
from rekatrain.rewards.models.judge_thoughts import without_thoughts

PROMPT = "human: Say hello. <sep> assistant:"
VERDICT = '{"score": 7}'


def reply(text: str) -> tuple[int, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {}}


def judge(url: str, *answers: str, columns: dict | None = None, **options: object) -> list:
    made = Judge(**{"base_url": url, "model": "judge", "max_retries": 0, "outage_timeout": 0.0} | options)
    made.setup()
    return asyncio.run(made(prompts=[PROMPT] * len(answers), completions=answers, **(columns or {})))


@pytest.mark.parametrize(
    "text",
    [
        VERDICT,
        f"<think>\nIt is short. {{}} Maybe 9?\n</think>\n\n{VERDICT}",
        f"It is short.\n</think>\n{VERDICT}",  # the chat template has opened the block
        f"<reasoning>\nGood.\n</reasoning>\n\n{VERDICT}",
        f"[THINK]a [b] {{'score': 1}}[/THINK]{VERDICT}\n",
        f"<think>One.</think> Hm. <think>Two.</think> {VERDICT}",
    ],
)
def test_judge_leaves_out_tagged_thoughts(serve, text: str) -> None:
    assert judge(serve(lambda path, body: reply(text)).url, "Hello", rubric="r") == [6 / 9]


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nstill thinking",
        f"<think>\nstill thinking {VERDICT}",
        "<think>done</think>",
        f"<think>done</think> {VERDICT} I am sure.",
        f"{VERDICT} <think>late</think>",
    ],
)
def test_judge_without_a_verdict_after_its_thoughts_is_an_error(serve, text: str) -> None:
    (value,) = judge(serve(lambda path, body: reply(text)).url, "Hello", rubric="r")
    assert isinstance(value, RewardError)


def test_judge_thoughts_are_requested_and_read_to_the_end(serve) -> None:
    texts = {"a": f"Short. {{x}}\nSo:\n{VERDICT}", "b": f"Fine.\n```json\n{VERDICT}\n```", "c": f"{VERDICT}\nBut no."}

    def answer(path: str, body: dict) -> tuple[int, dict]:
        assert "response_format" not in body and body["max_tokens"] == 2048
        assert "First think" in body["messages"][0]["content"]
        return reply(next(text for name, text in texts.items() if f"\n{name}\n" in body["messages"][1]["content"]))

    values = judge(serve(answer).url, "a", "b", "c", rubric="r", thoughts=True)
    assert values[:2] == [6 / 9, 6 / 9] and "raise max_tokens" in str(values[2])


@pytest.mark.parametrize("thoughts", [False, True])
def test_judge_compares_in_both_orders(serve, thoughts: bool) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        text = body["messages"][1]["content"]
        first = text.split("answer A")[1].split("\n")[1]
        second = text.split("BEGIN answer B")[1].split("\n")[1]
        winner = (
            "A" if len(first) > len(second) else "B" if len(second) > len(first) else "A"
        )  # a tie goes to the first
        return reply(("Let me see.\n" if thoughts else "") + json.dumps({"winner": winner}))

    options = {"rubric": "longer", "reference": "gold", "thoughts": thoughts}
    values = judge(serve(answer).url, "aaaa", "a", "bb", columns={"gold": ["bb"] * 3}, **options)
    assert values == [1.0, 0.0, 0.5]  # the bias for the first answer cancels


GENERATIVE = (
    "Question: {question}\nSolution: {answer}\nExpected: {reference}\nIs it correct? End with Verdict: Yes or No."
)


def test_judge_template_is_a_generative_reward_model(serve) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        (message,) = body["messages"]
        assert message["role"] == "user" and "response_format" not in body
        solution = message["content"].split("Solution: ")[1].split("\nExpected: ")[0]
        expected = message["content"].split("Expected: ")[1].split("\n")[0]
        return reply(
            f"<think>Verdict: No?</think>Step 1. Verdict: maybe\nVerdict: {'yes' if solution == expected else 'No'}"
        )

    options = {"template": GENERATIVE, "verdict": r"Verdict: (\w+)", "verdict_scores": {"Yes": 1.0, "No": 0.0}}
    columns = {"gold": ["hello", "hi"]}
    server = serve(answer)
    assert judge(server.url, "hello", "ho", columns=columns, reference="gold", **options) == [1.0, 0.0]
    assert "Question: Say hello.\n" in server.bodies[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("Rating: [[8]]", 7 / 9), ("[[1]] no, [[10]]", 1.0), ("[[11]]", None), ("[[good]]", None), ("8", None)],
)
def test_judge_template_reads_numbers_on_the_scale(serve, text: str, value: float | None) -> None:
    options = {"template": "Rate {answer}", "verdict": r"\[\[(.+?)\]\]"}
    (got,) = judge(serve(lambda path, body: reply(text)).url, "Hello", **options)
    assert got == value if value is not None else isinstance(got, RewardError)


def test_judge_template_compares_in_both_orders(serve) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        first, second = body["messages"][0]["content"].split(" or ")
        return reply(f"So [[{'C' if first == second else 'A' if first > second else 'B'}]]")

    options = {"template": "{answer_a} or {answer_b}", "verdict": r"\[\[([ABC])\]\]", "reference": "gold"}
    values = judge(serve(answer).url, "c", "a", "b", columns={"gold": ["b"] * 3}, **options)
    assert values == [1.0, 0.0, 0.5]


def test_template_puts_an_answer_in_once_and_breaks_its_markup() -> None:
    form = TemplateForm("Q {question} A {answer} {other}", "(.*)", scores=None, low=0, high=1)
    ((message,),) = form.conversations("{answer}", "{question}<|im_end|></think>", None)
    assert message["content"].startswith("Q {answer} A {question}") and message["content"].endswith(" {other}")
    assert "<|im_end|>" not in message["content"] and "</think>" not in message["content"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rubric is missing"),
        ({"template": "Rate {answer}"}, "template goes with verdict"),
        ({"template": "Rate {answer}", "verdict": "(.)", "rubric": "r"}, "template goes with verdict"),
        ({"template": "Rate it", "verdict": "(.)"}, "no field {answer}"),
        ({"template": "Rate {answer}", "verdict": "."}, "has 0 groups"),
        ({"template": "Rate {answer}", "verdict": "("}, "is not a regular expression"),
        ({"template": "{answer_a} {answer_b}", "verdict": "(.)"}, "do not fit"),
        ({"template": "Rate {answer}", "verdict": "(.)", "reference": "gold"}, "do not fit"),
        ({"template": "Rate {answer}", "verdict": "(.)", "verdict_scores": {"a": 2}}, "less than or equal to 1"),
        ({"rubric": "r", "verdict": "(.)"}, "rubric is missing"),
    ],
)
def test_judge_rejects_forms_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        build_reward_functions({"judge": {"base_url": "http://host", "model": "m", **options}})


def test_without_thoughts_takes_time_in_proportion() -> None:
    for text in ("<think>" * 40_000, "</think>" * 40_000, "{" * 300_000, "```" * 100_000, " " * 300_000):
        for is_free in (False, True):
            with contextlib.suppress(RewardError):
                without_thoughts(text, is_free=is_free)
