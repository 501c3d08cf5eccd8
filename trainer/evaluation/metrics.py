"""The metrics of an evaluation while a run trains: functions of its answers alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from rekatrain.data.chat import FinishReason
from rekatrain.trainer.evaluation.figures import Figures, figures, mean_reward
from rekatrain.trainer.held_out_prompts import EvaluateConfig, HeldOut

# Name in the log -> key of the figures.
NAMES = {"accuracy": "accuracy", "accuracy_low": "low", "accuracy_high": "high"}


def evaluation_metrics(answers: Sequence[Mapping[str, Any]], config: EvaluateConfig) -> dict[str, float | None]:
    """Return the metrics of all answers (figures.py).

    eval/accuracy:           fraction of first answers whose deciding reward is exactly 1.0, of those that it grades
    eval/accuracy_low, _high: its Wilson 95 % interval
    eval/SOURCE/accuracy, ..._low, ..._high: the same for each source, where there are several
    eval/avg@k, eval/pass@k: of all k answers to each prompt, with several answers
    eval/rewards/NAME/mean, .../low, .../high: mean over prompts, with its 95 % interval by bootstrap
    eval/completions/mean_length, .../clipped_ratio: tokens; fraction of answers at the token limit
    """
    is_graded = any(answer["index"] == 0 and answer["rewards"][config.reward] is not None for answer in answers)
    found = figures(answers, config.reward) if is_graded else {}
    metrics: dict[str, float | None] = dict(_accuracy("eval", found))
    for name, of_source in found.get("sources", {}).items():
        metrics |= _accuracy(f"eval/{name}", of_source)
    if config.num_generations > 1 and found:
        k = config.num_generations
        metrics |= {f"eval/avg@{k}": found["avg"]["accuracy"], f"eval/pass@{k}": found["pass_at"].get(k)}
    by_prompt: dict[int, list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["prompt_index"], []).append(answer)
    for name in answers[0]["rewards"]:
        values = mean_reward([*by_prompt.values()], name) or {}
        metrics |= {f"eval/rewards/{name}/{key}": values.get(key) for key in ("mean", "low", "high")}
    metrics["eval/completions/mean_length"] = sum(answer["num_tokens"] for answer in answers) / len(answers)
    num_cut = sum(answer["finish_reason"] == FinishReason.LENGTH.value for answer in answers)
    metrics["eval/completions/clipped_ratio"] = num_cut / len(answers)
    return metrics


def metric_names(held_out: HeldOut) -> list[str]:
    """Return the names of the metrics that evaluations of these prompts have."""
    rewards = {reward.name: 1.0 for reward in held_out.rewards}
    sources = dict.fromkeys(prompt.row.source.name for prompt in held_out.prompts)
    answer = {"num_tokens": 1, "num_thinking": 0, "finish_reason": FinishReason.STOP.value, "rewards": rewards}
    answers = [
        {**answer, "prompt_index": number, "index": index, "source": source}
        for number, source in enumerate(sources)
        for index in range(held_out.config.num_generations)
    ]
    return [*evaluation_metrics(answers, held_out.config)]


def _accuracy(prefix: str, found: Figures) -> dict[str, float | None]:
    return {f"{prefix}/{name}": found.get(key) for name, key in NAMES.items()}
