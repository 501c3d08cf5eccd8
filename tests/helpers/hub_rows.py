"""A few rows of each public data set that the 21B recipes name, with the columns of its card on huggingface.co.

Problems and solutions are our own; names, nesting and markup of the columns are those of the data sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets


@dataclass(frozen=True, kw_only=True)
class HubRows:
    """Rows of one data set.

    configs: names that `load_dataset` accepts as its second argument; None is among them if there is a default
    splits:  splits of each config
    rows:    rows of every config and split
    num_bad: how many of the rows the recipes have to leave out
    """

    configs: Sequence[str | None]
    splits: Sequence[str]
    rows: list[dict[str, Any]]
    num_bad: int = 0


def load_dataset(path: str, name: str | None, *, split: str, revision: str | None = None) -> datasets.Dataset:
    """Do as `datasets.load_dataset`, for the data sets of this file alone."""
    hub = HUB[path]
    assert name in hub.configs, f"{path} has no config {name}"
    assert split in hub.splits, f"{path} has no split {split}"
    assert revision is None
    return datasets.Dataset.from_list(hub.rows)


def _dapo(prompt: str, solution: str, index: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "solution": solution,
        "data_source": "math_dapo",
        "source_prompt": [{"content": f"Solve this. The last line is Answer: $Answer.\n\n{prompt}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": solution, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def _numina(problem: str, answer: str, **others: Any) -> dict[str, Any]:
    return {
        "problem": problem,
        "solution": f"We find {answer}.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "olympiads",
        "synthetic": False,
        **others,
    }


def _open_r1(problem: str, thought: str, answer: str) -> dict[str, Any]:
    trace = f"<think>\n{thought}\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."
    return {
        "problem": problem,
        "solution": f"It is {answer}.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "0b8a7d2e",
        "is_reasoning_complete": [True, True],
        "generations": [trace, trace],
        "correctness_math_verify": [True, False],
        "correctness_llama": None,
        "finish_reasons": ["stop", "stop"],
        "correctness_count": 1,
        "messages": [{"content": problem, "role": "user"}, {"content": trace, "role": "assistant"}],
    }


def _thoughts(question: str, thought: str, answer: str) -> dict[str, Any]:
    trace = (
        f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
        f"<|begin_of_solution|>\n\n{answer}\n\n<|end_of_solution|>"
    )
    return {
        "system": "Your role as an assistant involves thoroughly exploring questions. Write a Thought and a Solution.",
        "conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": trace}],
    }


def _program(statement: str, solution: str, cases: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "source": "apps",
        "task_type": "verifiable_code",
        "in_source_id": "7",
        "problem_statement": statement,
        "gold_standard_solution": solution,
        "problem_id": "vfc_7",
        "metadata": {
            "difficulty": "easy",
            "memory_limit": None,
            "memory_limit_bytes": None,
            "problem_url": None,
            "time_limit": "1 second",
        },
        "verification_info": {
            "language": "python",
            "test_cases": [
                {"fn_name": None, "input": given, "output": expected, "type": "stdin_stdout"}
                for given, expected in cases
            ],
        },
    }


def _preference(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}]

    return {
        "prompt": prompt,
        "prompt_id": "5f2c",
        "chosen": turns(chosen),
        "rejected": turns(rejected),
        "messages": turns(chosen),
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }


HUB: dict[str, HubRows] = {
    "open-r1/DAPO-Math-17k-Processed": HubRows(
        configs=["all", "en", "cn"],
        splits=["train"],
        rows=[
            _dapo("What is the sum of the first 12 positive integers?", "78", "a1"),
            _dapo("Find the smallest n with n^2 > 1000.", "32", "a2"),
        ],
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": HubRows(
        configs=[None],
        splits=["train"],
        rows=[
            {"problem": "Write $\\frac{3}{8}$ as a decimal.", "answer": "0.375", "solution": "3/8 = 0.375."},
            {"problem": "Factor $x^2 - 1$.", "answer": "(x-1)(x+1)", "solution": ""},
            {"problem": "A problem without an answer.", "answer": "", "solution": ""},
        ],
        num_bad=1,
    ),
    "SynthLabsAI/Big-Math-RL-Verified": HubRows(
        configs=[None],
        splits=["train"],
        rows=[
            {"problem": "What is 7/3 of 9?", "answer": "21", "source": "orca_math", "domain": ["Arithmetic"]}
            | {"llama8b_solve_rate": 0.25},
            {"problem": "What is 1 + 1?", "answer": "2", "source": "gsm8k", "domain": ["Arithmetic"]}
            | {"llama8b_solve_rate": 1.0},
            {"problem": "What is 5 + 1?", "answer": "6", "source": "gsm8k", "domain": []}
            | {"llama8b_solve_rate": None},
        ],
        num_bad=2,
    ),
    "AI-MO/NuminaMath-1.5": HubRows(
        configs=[None],
        splits=["train"],
        rows=[
            _numina("How many diagonals has a convex heptagon?", "14"),
            _numina("Solve $2^x = 32$.", "5"),
            _numina("Which is prime? A) 4 B) 7", "B", question_type="MCQ"),
            _numina("Prove that 2 is prime.", "proof", question_type="proof"),
            _numina("A problem without a question.", "3", problem_is_valid="Problem not solved"),
            _numina("A made problem.", "3", synthetic=True),
        ],
        num_bad=4,
    ),
    "open-r1/verifiable-coding-problems-python": HubRows(
        configs=[None],
        splits=["train"],
        rows=[
            _program(
                "Read a and b on one line. Print their sum.",
                "```python\na, b = map(int, input().split())\nprint(a + b)\n```",
                [("1 2\n", "3\n"), ("-4 9\n", "5\n")],
            )
        ],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": HubRows(
        configs=[None],
        splits=["train_prefs", "test_prefs", "train_sft", "test_sft", "train_gen", "test_gen"],
        rows=[
            _preference("Name a color.", "Blue, like the sky.", "no"),
            _preference("Say hello.", "Hello! How are you?", "What?"),
            _preference("Both are equal.", "Yes.", "Yes."),
        ],
        num_bad=1,
    ),
    "open-r1/OpenR1-Math-220k": HubRows(
        configs=["default", "all", "extended"],
        splits=["train"],
        rows=[_open_r1(f"What is {n} + {n}?", f"Doubling {n} gives {2 * n}.", str(2 * n)) for n in range(40)],
    ),
    "open-thoughts/OpenThoughts-114k": HubRows(
        configs=[None, "default"],
        splits=["train"],
        rows=[_thoughts("Is 91 prime?", "7 times 13 is 91.", "No: $91 = 7 \\cdot 13$.")],
    ),
    "HuggingFaceTB/smol-smoltalk": HubRows(
        configs=[None],
        splits=["train", "test"],
        rows=[
            {
                "messages": [
                    {"content": "You are a helpful AI assistant.", "role": "system"},
                    {"content": "Hi!", "role": "user"},
                    {"content": "Hello. What can I do for you?", "role": "assistant"},
                    {"content": "Name a fish.", "role": "user"},
                    {"content": "The trout.", "role": "assistant"},
                ],
                "source": "smol-magpie-ultra-short",
            }
        ],
    ),
    "HuggingFaceH4/aime_2024": HubRows(
        configs=[None],
        splits=["train"],
        rows=[
            {"id": 60, "problem": "Find $b$ with $b^2 = 14641$.", "solution": "$\\boxed{121}$", "answer": "121"}
            | {"url": "https://example.org/1", "year": "2024"},
            {"id": 61, "problem": "Find the last three digits of 4025.", "solution": "$\\boxed{025}$", "answer": "025"}
            | {"url": "https://example.org/2", "year": "2024"},
        ],
    ),
    "HuggingFaceH4/MATH-500": HubRows(
        configs=[None],
        splits=["test"],
        rows=[
            {
                "problem": "Convert $(0,3)$ to polar coordinates.",
                "solution": "It is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}$.",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            }
        ],
    ),
}
