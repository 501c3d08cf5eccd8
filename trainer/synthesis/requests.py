"""The prompts to sample, each once, and their completions that are still missing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.synthesis.journal import Journal, Key


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, and its name in the journal: a hash of its text, which other rows of the data set do not change."""

    prompt: Prompt
    name: str

    def keys(self, num_generations: int) -> list[Key]:
        """Return the keys of its completions."""
        return [(self.name, index) for index in range(num_generations)]


def make_questions(prompts: Sequence[Prompt]) -> list[Question]:
    """Return a question for each different prompt; of rows with equal prompts, the first one counts."""
    questions: dict[str, Question] = {}
    for prompt in prompts:
        name = hashlib.sha256(prompt.text.encode()).hexdigest()[:24]
        questions.setdefault(name, Question(prompt=prompt, name=name))
    return list(questions.values())


def missing(question: Question, num_generations: int, journal: Journal) -> list[int]:
    """Return the indices of completions that have no answer yet."""
    return [index for name, index in question.keys(num_generations) if (name, index) not in journal.answers]


def seed_of(seed: int, question: Question, index: int) -> int:
    """Return the seed of a request: 31 bits, which every server accepts."""
    digest = hashlib.sha256(f"{seed} {question.name} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
