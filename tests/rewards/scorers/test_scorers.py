"""Rule-based scorers: gold answers of real data earn full marks, and answers meant to fool them none."""

import gzip
import json

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.data.errors import InputError
from rekatrain.data.sources import load_rows
from rekatrain.rewards.code.code_tests import CodeTests, extract_code
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.scorers.answers import JsonSchema, Regex, exact_match, multiple_choice, numeric_close
from rekatrain.rewards.scorers.instructions import CHECKS, InstructionFollowing, count_sentences, is_followed
from rekatrain.rewards.scorers.math_answer import math_answer
from rekatrain.rewards.scorers.text import Language, Length, repetition
from tests.conftest import REAL_DATA


def answered(text):
    return parse_completion(render_completion("Hm.", text) if text else "<reasoning>\nHm.\n</reasoning> <sep>")


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("Paris", "Paris", 1.0),
        ("**paris.**", "Paris", 1.0),
        (r"It is \boxed{\text{Paris}}", "Paris", 1.0),
        ("The answer is Paris.\nIt lies on the Seine.", "Paris", 1.0),
        ("Final answer: new  york", "New York", 1.0),
        ("NYC", ["New York", "NYC"], 1.0),
        ("42", 42, 1.0),
        # a longer text that holds the answer, or several answers, is not the answer
        ("It is not Paris", "Paris", 0.0),
        ("Paris or London", "Paris", 0.0),
        ("Paris, London, Rome, Berlin", "Paris", 0.0),
        ("The answer is London, not Paris.", "Paris", 0.0),
        ("The answer is Paris. No, the answer is London.", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("...", "Paris", 0.0),
        ("Paris", None, None),
        ("Paris", "", None),
        ("Paris", [], None),
    ],
)
def test_exact_match_scores(text, gold, score):
    assert exact_match(answered(text), answer=gold) == score


def test_exact_match_respects_case_with_ignore_case_false():
    assert exact_match(answered("paris"), answer="Paris", ignore_case=False) == 0.0


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("9.81", 9.8, 1.0),
        ("about 9.81 m/s", "9.8", 1.0),
        ("g = 9.81", "9.8", 1.0),
        (r"\boxed{1,234.5}", 1234, 1.0),
        ("−3", -3, 1.0),
        ("6.02e23", 6.022e23, 1.0),
        (".5", 0.5, 1.0),
        ("10.0", 9.8, 0.0),
        ("-9.8", 9.8, 0.0),
        ("The answer is 9.8 or 5.", 9.8, 0.0),
        (r"\boxed{1, 2, 9.8}", 9.8, 0.0),
        ("nothing", 9.8, 0.0),
        ("9.8.1", 9.8, 0.0),
        ("", 9.8, 0.0),
        ("5", "many", None),
        ("5", None, None),
    ],
)
def test_numeric_close_scores(text, gold, score):
    assert numeric_close(answered(text), answer=gold) == score


def test_numeric_close_uses_the_tolerances_of_the_recipe():
    assert numeric_close(answered("10.0"), answer=9.8, rel_tol=0.05) == 1.0
    assert numeric_close(answered("0.001"), answer=0, abs_tol=0.01) == 1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("B", 1.0),
        ("b", 1.0),
        ("(B)", 1.0),
        ("**B**", 1.0),
        ("B. Paris", 1.0),
        ("B) Paris", 1.0),
        (r"\boxed{B}", 1.0),
        (r"\boxed{\text{B}}", 1.0),
        ("The answer is (B).", 1.0),
        ("The answer is B: Paris", 1.0),
        ("A is too small and I doubt C. The answer is B.", 1.0),
        ("Option B", 1.0),
        # hedging
        ("A B C D", 0.0),
        ("A or B", 0.0),
        ("The answer is A or B", 0.0),
        ("The answer is B and C", 0.0),
        ("The answer is B. No, the answer is C.", 0.0),
        ("(A) (B) (C) (D)", 0.0),
        (r"\boxed{A, B}", 0.0),
        ("ABCD", 0.0),
        ("Paris", 0.0),
        ("C", 0.0),
        ("", 0.0),
    ],
)
def test_multiple_choice_scores(text, score):
    assert multiple_choice(answered(text), choice="B") == score


def test_multiple_choice_is_none_without_a_letter_in_the_row():
    assert multiple_choice(answered("B"), choice=None) is None
    assert multiple_choice(answered("B"), choice="Paris") is None


def test_regex_and_json_schema_score_the_whole_answer_or_a_part():
    assert Regex(pattern=r"^\d+$")(answered("42")) == 1.0
    assert Regex(pattern=r"\d+", whole=True)(answered("42 or so")) == 0.0
    schema = {
        "type": "object",
        "required": ["a"],
        "additionalProperties": False,
        "properties": {"a": {"type": "integer"}},
    }
    strict, lenient = JsonSchema(schema=schema), JsonSchema(schema=schema, text_around=True)
    for text, score in [
        ('{"a": 1}', 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('{"a": "1"}', 0.0),
        ('{"a": 1, "b": 2}', 0.0),
        ('{"a": 1, "a": "x"}', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ]:
        assert strict(answered(text)) == score, text
    assert (strict(answered('So: \n```\n{"a": 1}\n```')), lenient(answered('So: \n```\n{"a": 1}\n```'))) == (0.0, 1.0)


def test_length_counts_tokens():
    overlong, cosine = Length(max_length=100, buffer=20), Length(max_length=100, shape="cosine")
    ids = [[0] * length for length in (0, 80, 90, 100, 200)]
    texts = ["x"] * 5
    assert overlong(completions=texts, completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert cosine(completions=texts, completion_ids=[[0] * n for n in (0, 50, 100, 200)]) == pytest.approx(
        [1, 0.5, 0, 0]
    )


def test_repetition_falls_with_repeated_words():
    fresh = "one two three four five six seven eight nine ten"
    assert repetition(answered(fresh)) == 0.0
    assert repetition(answered("so it goes on " * 100)) < -0.95
    assert -0.6 < repetition(answered(f"{fresh} {fresh}")) < -0.3
    assert repetition(answered("")) == 0.0


def test_language_reads_reasoning_and_answer_but_no_formulas():
    language = Language()
    language.setup()
    english = "Okay, so we need to find the sum of both numbers, which is easy."
    german = "Gut, wir müssen also die Summe der beiden Zahlen finden, das ist einfach."
    for thought, answer, score in [
        (english, "The answer is therefore forty-two apples.", 1.0),
        (english, "42", 1.0),
        (english + r" So $\sum_i x_i = \frac{\pi}{2}$, and α + β = γ.", r"\boxed{42}", 1.0),
        (german, "42", 0.0),
        (english, german, 0.0),
        (english + " 所以答案是四十二,因为我们把两个数加在一起。", "42", 0.0),
        (english, "Ответ сорок два.", 0.0),
        ("1 + 1 = 2", "2", None),
    ]:
        assert language(parse_completion(render_completion(thought, answer))) == score, (thought, answer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regex(pattern="("), r"pattern '\(' is not a regular expression"),
        (lambda: JsonSchema(schema={"type": "no"}), "schema is not a JSON schema"),
        (lambda: JsonSchema(schema="no/such/file"), "schema 'no/such/file' cannot be read"),
        (lambda: Length(max_length=10), "buffer is missing: shape overlong needs"),
        (lambda: Length(max_length=10, buffer=20), r"buffer is 20; it should be at most max_length \(10\)"),
        (lambda: Length(max_length=10, buffer=5, shape="cosine"), "buffer is 5, but shape cosine has none"),
        (lambda: Language(language="english"), "language is 'english'; it should be one of the codes"),
        (lambda: build_reward_functions({"code_tests": {"time_limit": 0}}), "code_tests.time_limit is 0; it should be"),
        (lambda: build_reward_functions({"code_tests": {"isolation": "none"}}), "isolation is 'none'; it should be"),
        (lambda: is_followed("no:such", {}, "x"), "there is no instruction 'no:such'"),
        (lambda: is_followed("punctuation:no_comma", {"x": 1}, "x"), "cannot have the options"),
    ],
)
def test_scorers_reject_a_wrong_option_when_they_are_made(make, message):
    with pytest.raises(InputError, match=message):
        make()


# Instructions: for each of IFEval's 25 kinds a text that follows and one that does not

INSTRUCTIONS = [
    ("keywords:existence", {"keywords": ["sea", "Sun"]}, "The sun set over the sea.", "The sun set."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea, sea.", "Sea."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, "Sea.", "Sea, sea."),
    ("keywords:forbidden_words", {"forbidden_words": ["art"]}, "A cart.", "Art is long."),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    ("language:response_language", {"language": "de"}, "Das Wetter ist heute schön.", "The weather is nice today."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, "One. Two.", "1! 2? Three."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", "a-b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, last.",
        "First.\n\nLast.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [town]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP.S. again", "Bye PS again"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S again", "Bye\nP.S. again"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and b"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 a Day 2 b", "Day 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<On rain>>\nIt falls.", "<< >>\nIt falls."),
    ("combination:two_responses", {}, "Yes.\n******\nNo.", "Yes.\n******\nYes."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, "why? Because.", "Because. Why?"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. THE END.", "The end. Or not"),
    ("startend:quotation", {}, '"Yes."', '"Yes'),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"}, "A b", "Ab b"),
    ("change_case:english_capital", {}, "IT IS RAINING ON THE HOUSE", "It Is Raining On The House"),
    ("change_case:english_lowercase", {}, "it is raining on the house", "It is raining on the house"),
    ("punctuation:no_comma", {}, "One; two.", "One, two."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "followed", "broken"), INSTRUCTIONS)
def test_is_followed_accepts_one_text_and_rejects_another(name, options, followed, broken):
    options_of_the_hub = {**options, "unused": None}  # its rows have every key, most of them null
    assert is_followed(name, options_of_the_hub, followed) and not is_followed(name, options_of_the_hub, broken)


def test_instructions_cover_all_25_kinds_of_ifeval():
    assert len(CHECKS) == 25 and {name for name, *_ in INSTRUCTIONS} == set(CHECKS)


def test_instruction_following_rejects_an_empty_answer():
    columns = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, None]}
    strict, partial = InstructionFollowing(), InstructionFollowing(partial_credit=True)
    assert (strict(answered("<<T>>"), **columns), strict(answered("T"), **columns)) == (1.0, 0.0)
    assert partial(answered("T"), **columns) == 0.5
    assert partial(answered(""), **columns) == 0.0
    assert strict(answered("T"), instruction_id_list=None, kwargs=None) is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Dr. Smith paid $3.50, e.g. for tea. He left.", 2),
        ("1. Wash it.\n2. Dry it.", 2),
        ('He said "No." Then he left', 2),
        ("No mark", 1),
        ("", 0),
        ("What?! Really...", 2),
    ],
)
def test_count_sentences_counts_end_marks(text, count):
    assert count_sentences(text) == count


# Code


@pytest.fixture(scope="module")
def code_tests():
    try:
        return CodeTests(time_limit=10)
    except InputError as error:
        pytest.skip(str(error))


def test_extract_code_takes_the_last_python_block():
    assert extract_code("```python\na\n```\n```py\nb\n```\n```json\n{}\n```") == "b\n"
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("```\nx = 1\n```") == "x = 1\n"


def test_code_tests_run_unit_tests_and_programs(code_tests):
    add, wrong = "```python\ndef add(a, b):\n    return a + b\n```", "```python\ndef add(a, b):\n    return 3\n```"
    asserts = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
    assert (code_tests(answered(add), tests=asserts), code_tests(answered(wrong), tests=asserts)) == (1.0, 0.0)
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    pairs = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10 \n\n"}]
    assert (code_tests(answered(program), tests=pairs), code_tests(answered("print(3)"), tests=pairs)) == (1.0, 0.0)
    assert code_tests(answered("print(3)\nraise SystemExit(1)"), tests=pairs[:1]) == 0.0
    assert code_tests(answered(add), tests=None) is None
    partial = CodeTests(partial_credit=True)
    assert partial(answered(wrong), tests=asserts) == partial(answered("print(3)"), tests=pairs) == 0.5


@pytest.mark.parametrize(
    "tests", ["x = True", [1], {"asserts": []}, {"asserts": ["x"], "tset": ""}, [{"input": "1"}], {"setup": "x"}]
)
def test_code_tests_reject_a_column_that_holds_no_tests(code_tests, tests):
    with pytest.raises(InputError, match="the column tests"):
        code_tests(answered("x = 1"), tests=tests)


# Gold answers of real data, read through their layouts


def golds(path, **options):
    return [(row, render_completion(None, row.messages[-1]["content"])) for row in load_rows(str(path), **options).rows]


def test_math_answer_gives_svamp_golds_full_marks():
    rows = golds(REAL_DATA / "svamp.jsonl.gz", format="svamp")
    assert len(rows) == 1_000
    for row, text in rows:
        assert math_answer(parse_completion(text), answer=row.columns["answer"]) == 1.0, row


@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_code_tests_give_gold_code_full_marks(code_tests, name):
    # Each costs two processes: every tenth here.
    rows = golds(REAL_DATA / f"{name}.jsonl.gz", format=name)[::10]
    assert len(rows) >= 16
    failed = [row.where for row, text in rows if code_tests(parse_completion(text), tests=row.columns["tests"]) != 1.0]
    assert not failed


def test_code_tests_accept_a_function_body_for_humaneval(code_tests):
    with gzip.open(REAL_DATA / "humaneval.jsonl.gz") as lines:
        records = [json.loads(line) for line in lines]
    rows = golds(REAL_DATA / "humaneval.jsonl.gz", format="humaneval")
    for record, (row, _) in list(zip(records, rows, strict=True))[5:60:15]:
        body = f"```python\n{record['canonical_solution']}```"
        completion = parse_completion(render_completion(None, body))
        assert code_tests(completion, tests=row.columns["tests"]) == 1.0, row.where


def test_instruction_following_grades_ifeval_rows():
    rows = load_rows(str(REAL_DATA / "ifeval.jsonl.gz"), format="prompt_answer").rows
    columns = [{key: row.columns[key] for key in ("instruction_id_list", "kwargs")} for row in rows]
    assert {name for row in columns for name in row["instruction_id_list"]} == set(CHECKS)
    scorer = InstructionFollowing()
    followed = 0
    for row in columns:
        text = follow(row)
        if text is not None:
            followed += 1
            assert scorer(answered(text), **row) == 1.0, (row, text)
    assert followed >= 180
    assert sum(scorer(answered("Sure, I can help."), **row) == 1.0 for row in columns) < 120


def follow(row):
    """An answer made for the instructions, where all of them are of simple kinds."""
    text = "it rains on the house and the sea is calm"
    for name, options in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        kind = name.partition(":")[2]
        if kind == "existence":
            text += " " + " ".join(options["keywords"])
        elif kind == "frequency" and options["relation"] == "at least":
            text += f" {options['keyword']}" * options["frequency"]
        elif kind == "number_placeholders":
            text += " [x]" * options["num_placeholders"]
        elif kind == "number_highlighted_sections":
            text += " *x*" * options["num_highlights"]
        elif kind == "postscript":
            text += f"\n{options['postscript_marker']} bye"
        elif kind == "title":
            text = f"<<rain>>\n{text}"
        elif kind == "number_words" and options["relation"] == "at least":
            text += " word" * options["num_words"]
        elif kind == "multiple_sections":
            text += "".join(
                f"\n{options['section_spliter']} {number} x" for number in range(1, options["num_sections"] + 1)
            )
        elif kind not in ("no_comma", "forbidden_words", "english_lowercase"):
            return None
    is_lower = "change_case:english_lowercase" in row["instruction_id_list"]
    return None if is_lower and not text.islower() else text
