"""The figures of an evaluation, from its answers alone: accuracy, avg@k, pass@k, maj@k, mean rewards, sources, budgets.

An answer is a JSON object: prompt_index, index (among the answers to its prompt), source, rewards, num_tokens,
num_thinking (tokens of its reasoning), finish_reason, vote (votes.py) and reasoning_budget.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from rekatrain.data.chat import FinishReason
from rekatrain.trainer.evaluation.votes import majority_rate
from rekatrain.trainer.intervals import bootstrap_interval, pass_rates, powers_of_two, wilson_interval

Answer = Mapping[str, Any]
Figures = dict[str, Any]


def all_figures(answers: Sequence[Answer], reward: str) -> Figures:
    """Return the figures of the last reasoning budget, if there are budgets, with those of each under `budgets`."""
    budgets = list(dict.fromkeys(answer.get("reasoning_budget") for answer in answers))
    of_budgets = [
        figures([answer for answer in answers if answer.get("reasoning_budget") == budget], reward)
        for budget in budgets
    ]
    result = of_budgets[-1]
    if len(budgets) > 1 or budgets[0] is not None:
        curve = zip(budgets, of_budgets, strict=True)
        result["budgets"] = [{"reasoning_budget": budget, **_point(values)} for budget, values in curve]
    return result


def figures(answers: Sequence[Answer], reward: str) -> Figures:
    """Return the figures of answers of one budget.

    num_right, num_graded, accuracy, low, high: of the first answers to the prompts, with the Wilson 95 % interval
    avg:       mean accuracy over all answers, with a 95 % interval by bootstrap over prompts
    avg_at:    k -> mean accuracy of the first k answers
    pass_at:   k -> chance that k answers contain a right one, unbiased
    maj_at:    k -> chance that the most frequent of k answers is right, unbiased
    maj:       the last of them, with the Wilson 95 % interval of as many prompts
    maj_gain:  the difference of maj and avg on its prompts, with a 95 % interval by bootstrap over prompts
    rewards:   name -> mean over prompts of their mean, with a 95 % interval by bootstrap over prompts, and the number
               of answers that have the reward
    thinking_tokens, completions: mean tokens of the reasoning; mean tokens, and the fraction of each finish reason
    sources:   name -> the same figures without this one, where there are several
    """
    ordered = sorted(answers, key=_prompt_index)
    groups = [list(group) for _, group in groupby(ordered, key=_prompt_index)]
    scores = [[answer["rewards"].get(reward) for answer in group] for group in groups]
    firsts = [of_prompt[0] for of_prompt in scores]
    accuracy = wilson_interval(num_right=firsts.count(1.0), num_graded=sum(value is not None for value in firsts))
    result: Figures = {**vars(accuracy)}
    num_answers = max(map(len, groups))
    if num_answers > 1:
        result |= _several(groups, reward, num_answers)
    names = dict.fromkeys(name for answer in ordered for name in answer["rewards"])
    means = {name: mean_reward(groups, name) for name in names}
    result["rewards"] = {name: values for name, values in means.items() if values is not None}
    result["thinking_tokens"] = fmean(answer["num_thinking"] for answer in ordered)
    result["completions"] = {"mean_length": fmean(answer["num_tokens"] for answer in ordered)} | {
        f"{reason.value}_ratio": fmean(answer["finish_reason"] == reason.value for answer in ordered)
        for reason in FinishReason
    }
    sources = sorted({_source(answer) for answer in ordered})
    if len(sources) > 1:
        result["sources"] = {
            name: figures([answer for answer in ordered if _source(answer) == name], reward)
            for name in sources
            if any(group[0]["rewards"].get(reward) is not None for group in groups if _source(group[0]) == name)
        }
    return result


def mean_reward(groups: Sequence[Sequence[Answer]], name: str) -> Figures | None:
    """Return mean, low, high and num_graded of a reward; None if no answer has it."""
    values = [
        [answer["rewards"][name] for answer in group if answer["rewards"].get(name) is not None] for group in groups
    ]
    known = [of_prompt for of_prompt in values if of_prompt]
    if not known:
        return None
    means = [fmean(of_prompt) for of_prompt in known]
    low, high = bootstrap_interval(means)
    return {"mean": fmean(means), "low": low, "high": high, "num_graded": sum(map(len, known))}


def _several(groups: Sequence[Sequence[Answer]], reward: str, num_answers: int) -> Figures:
    """Return the figures of several answers to each prompt."""
    scores = [[answer["rewards"].get(reward) for answer in group] for group in groups]
    graded = [[value for value in of_prompt if value is not None] for of_prompt in scores]
    means = [fmean(value == 1.0 for value in of_prompt) for of_prompt in graded if of_prompt]
    low, high = bootstrap_interval(means)
    result: Figures = {"avg": {"accuracy": fmean(means), "low": low, "high": high}}
    counts = powers_of_two(num_answers)
    result["avg_at"] = {
        k: fmean(fmean(value == 1.0 for value in of_prompt[:k]) for of_prompt in graded if of_prompt) for k in counts
    }
    result["pass_at"] = pass_rates(scores)
    ballots = [
        [(answer["vote"], float(answer["rewards"][reward] == 1.0)) for answer in group]
        for group, values in zip(groups, graded, strict=True)
        if values and all("vote" in answer for answer in group)
    ]
    if ballots:
        rates = {k: [majority_rate(ballot, k) for ballot in ballots if len(ballot) >= k] for k in counts}
        result["maj_at"] = {k: fmean(values) for k, values in rates.items()}
        last = wilson_interval(num_right=sum(rates[num_answers]), num_graded=len(rates[num_answers]))
        result["maj"] = {"accuracy": last.accuracy, "low": last.low, "high": last.high}
        complete = [ballot for ballot in ballots if len(ballot) == num_answers]
        gains = [majority_rate(ballot, num_answers) - fmean(right for _, right in ballot) for ballot in complete]
        low, high = bootstrap_interval(gains)
        result["maj_gain"] = {"mean": fmean(gains), "low": low, "high": high}
    return result


def _point(values: Figures) -> Figures:
    rates = ("accuracy", "low", "high", "num_right", "num_graded", "thinking_tokens")
    keys = (*rates, "avg", "maj", "maj_gain", "pass_at", "maj_at")
    return {key: values[key] for key in keys if key in values}


def _source(answer: Answer) -> str:
    return answer.get("source") or ""


def _prompt_index(answer: Answer) -> int:
    index: int = answer["prompt_index"]
    return index
