"""Ask for the completions of all prompts and score them: what `rekatrain generate` and `rekatrain filter` share.

Answers are written as they come, and scores batch by batch, so a start after a kill repeats neither.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.gradable import check_source_columns, keep_gradable
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.models.config import check_attention
from rekatrain.trainer.models.load import check_model, load_model_tokenizer
from rekatrain.trainer.processes.launched import is_launched
from rekatrain.trainer.prompts import Prompt, load_prompts
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.resume.fingerprints import take_fingerprints
from rekatrain.trainer.rloo.rollouts import reward_columns
from rekatrain.trainer.synthesis.config import SynthesisConfig
from rekatrain.trainer.synthesis.in_process import sample_answers
from rekatrain.trainer.synthesis.journal import Journal, Key, Score
from rekatrain.trainer.synthesis.progress import Progress
from rekatrain.trainer.synthesis.requests import Question, make_questions, missing
from rekatrain.trainer.synthesis.servers import ServerAnswers

logger = logging.getLogger(__name__)

# Completions that are scored together, where so many are waiting.
SCORED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """The outcome: all questions, the journal that holds their answers, and the names of the deciding rewards."""

    questions: list[Question]
    journal: Journal
    deciding: list[str]
    num_failed: int
    num_duplicate_prompts: int


def synthesize(recipe: Recipe, config: SynthesisConfig, write: Callable[[Synthesis], None]) -> None:
    """Get `num_generations` scored completions of each prompt, and call `write` while the folder is locked.

    Raises InputError for what is wrong with the recipe, its data or its rewards, before a weight is loaded or a request
    is sent, and where the folder holds answers of another recipe.
    """
    if is_launched():
        raise InputError("generate and filter run as one process: for several GPUs, name vLLM servers under server")
    server = config.endpoint
    tokenizer = load_model_tokenizer(recipe)
    model_config = check_model(recipe, tokenizer)
    if server is None:
        check_attention(model_config)
    rewards = build_reward_functions(recipe.rewards) if recipe.rewards else []
    # A teacher's answer may be longer than the context of the recipe's model: SFT cuts it, or leaves it out.
    length = 0 if server is not None and server.format == "chat" else config.max_completion_length
    prompts = load_prompts(recipe.dataset, tokenizer, model_config, length)
    if rewards:
        check_source_columns(rewards, {prompt.row.source.name: prompt.row.source for prompt in prompts}.values())
        gradable = keep_gradable(rewards, [prompt.row for prompt in prompts])
        prompts = [prompt for prompt, is_kept in zip(prompts, gradable, strict=True) if is_kept]
    questions = make_questions(prompts)
    with Journal(config.out, answer_settings(recipe, config), scoring_settings(recipe)) as journal:
        if journal.num_dropped:
            logger.info("the rewards have changed: %d answers are scored again", journal.num_dropped)
        num_failed = _collect(recipe, config, tokenizer, questions, journal, rewards)
        done = Synthesis(
            questions=questions,
            journal=journal,
            deciding=list(config.deciding) or [reward.name for reward in rewards if reward.weight > 0],
            num_failed=num_failed,
            num_duplicate_prompts=len(prompts) - len(questions),
        )
        write(done)


def answer_settings(recipe: Recipe, config: SynthesisConfig) -> dict[str, object]:
    """Return all that an answer depends on, but the prompt and the index."""
    sampling: dict[str, object] = {
        "seed": recipe.seed,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
    }
    server = config.endpoint
    if server is not None:  # its address may change
        of_server = {"format": server.format, "reasoning_tags": server.reasoning_tags, "extra_body": server.extra_body}
        return {"model": server.model, **of_server, **sampling}
    prints = take_fingerprints(recipe, [])
    weights = f"{prints.architecture[:16]} {prints.base_weights}"
    return {"model": recipe.model, "weights": weights, **sampling}


def scoring_settings(recipe: Recipe) -> dict[str, object]:
    """Return all that a score depends on, but the answer and the columns of its row."""
    prints = take_fingerprints(recipe, []) if recipe.rewards else None
    code = {} if prints is None else {"code": prints.rewards, "files": prints.files}
    return {"rewards": recipe.rewards, **code}


def model_name(recipe: Recipe, config: SynthesisConfig) -> str:
    """Return the name of the model that answers."""
    return config.endpoint.model if config.endpoint else str(recipe.model["pretrained_model_name_or_path"])


def _collect(
    recipe: Recipe,
    config: SynthesisConfig,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    journal: Journal,
    rewards: list[RewardFunction],
) -> int:
    """Fill the journal; return the number of requests that failed."""
    progress = Progress(num_wanted=len(questions) * config.num_generations, server=config.endpoint)
    counted: set[Key] = set()
    scorer = _Scorer(rewards, ScoringConfig(**recipe.scoring), tokenizer, journal)

    def count(question: Question, *, is_earlier: bool = False) -> list[tuple[Prompt, Key]]:
        """Count the new answers of a question; return those without a score."""
        keys = [key for key in question.keys(config.num_generations) if key in journal.answers]
        for key in keys:
            if key not in counted:
                counted.add(key)
                progress.count(journal.answer(key), is_earlier=is_earlier)
        return [(question.prompt, key) for key in keys if key not in journal.scores]

    with scorer:
        for question in questions:
            scorer.add(count(question, is_earlier=True))
        asked = [question for question in questions if missing(question, config.num_generations, journal)]
        logger.info("%d prompts, %d completions each; %s", len(questions), config.num_generations, progress.describe())
        source: Iterator[list[Question]] = iter(())
        answers: ServerAnswers | None = None
        if asked and config.endpoint is not None:
            answers = ServerAnswers(config, config.endpoint, asked, journal, seed=recipe.seed)
            source = iter(answers)
        elif asked:
            source = sample_answers(recipe, config, tokenizer, asked, journal)
        for done in source:
            for question in done:
                scorer.add(count(question))
            progress.show()
        scorer.finish()
    if asked:
        progress.show(is_last=True)
    num_failed = answers.num_failed if answers else 0
    if not len(journal.answers):
        raise InputError("the server has answered no request; the log shows the first failure")
    return num_failed


class _Scorer:
    """Scores answers of the journal in batches, each completion once."""

    def __init__(
        self,
        rewards: list[RewardFunction],
        config: ScoringConfig,
        tokenizer: PreTrainedTokenizerBase,
        journal: Journal,
    ) -> None:
        self._grader = Grader(rewards, config) if rewards else None
        self._tokenizer, self._journal = tokenizer, journal
        self._waiting: list[tuple[Prompt, Key]] = []

    def __enter__(self) -> "_Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._grader is not None:
            self._grader.close()

    def add(self, answers: Sequence[tuple[Prompt, Key]]) -> None:
        """Add answers that have no score; score all that wait once they are many."""
        self._waiting += answers
        while len(self._waiting) >= SCORED_AT_ONCE:
            self._score(self._waiting[:SCORED_AT_ONCE])
            del self._waiting[:SCORED_AT_ONCE]

    def finish(self) -> None:
        """Score the rest."""
        if self._waiting:
            self._score(self._waiting)
            self._waiting = []

    def _score(self, batch: Sequence[tuple[Prompt, Key]]) -> None:
        if self._grader is None:
            return
        answers = [self._journal.answer(key) for _, key in batch]
        rows = [prompt.row for prompt, _ in batch]
        scores = self._grader.score(
            prompts=[prompt.text for prompt, _ in batch],
            completions=[answer.text for answer in answers],
            completion_ids=[answer.ids or encode_text(answer.text, self._tokenizer) for answer in answers],
            columns=reward_columns(rows),
            judges=[row.source.rewards for row in rows],
        )
        for index, (_, key) in enumerate(batch):
            total = scores.total[index]
            score = Score(
                total=None if math.isnan(total) else total,
                rewards={name: values[index] for name, values in scores.by_name.items()},
            )
            self._journal.add_score(key, score)
