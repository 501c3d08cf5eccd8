"""Sampled groups as JSON values and arrays: a checkpoint holds those that wait to be trained."""

import math
from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np

from rekatrain.data.chat import FinishReason
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.metrics import count_runs
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.setup import RunSetup


def completions_to_json(completions: Sequence[Completion]) -> list[Json]:
    """Return a JSON object for each completion, with its ids and log-probabilities as arrays."""
    return [
        {
            "ids": np.array(completion.ids, np.int32),
            "logprobs": _to_array(completion.logprobs),
            "finish_reason": completion.finish_reason.value,
            "forced": [completion.forced.start, completion.forced.stop],
            "versions": count_runs(completion.versions),
        }
        for completion in completions
    ]


def completions_from_json(stored: Sequence[Json]) -> list[Completion]:
    """Return the completions that `completions_to_json` stored; earlier versions stored lists in place of arrays."""
    return [
        Completion(
            ids=np.asarray(fields["ids"]).tolist(),
            logprobs=np.asarray(fields["logprobs"]).tolist(),
            finish_reason=FinishReason(fields["finish_reason"]),
            forced=range(*fields["forced"]),
            versions=list(chain.from_iterable(repeat(*run) for run in fields.get("versions", []))),
        )
        for fields in stored
    ]


def group_to_json(group: Group, indices: dict[int, int]) -> Json:
    """Return a JSON object for a group; `indices` gives the index in the data of each prompt by its `id`."""
    return {
        "prompt_index": group.prompt_index,
        "prompt": indices[id(group.prompt)],
        "completions": completions_to_json(group.completions),
        "texts": group.texts,
        "rewards": _to_json(group.rewards),
        "rewards_by_name": {name: list(values) for name, values in group.rewards_by_name.items()},
        "reward_errors": [dict(errors) for errors in group.reward_errors],
        "is_in_loss": group.is_in_loss,
        "reward_metrics": [dict(metrics) for metrics in group.reward_metrics],
        "reward_notes": [dict(notes) for notes in group.reward_notes],
        "scaled_rewards": None if group.scaled_rewards is None else _to_json(group.scaled_rewards),
    }


def group_from_json(stored: Json, setup: RunSetup) -> Group:
    """Return the group that `group_to_json` stored."""
    scaled = stored.get("scaled_rewards")
    kept = ("prompt_index", "texts", "rewards_by_name", "reward_errors", "is_in_loss", "reward_metrics", "reward_notes")
    return Group(
        prompt=setup.prompts[stored["prompt"]],
        completions=completions_from_json(stored["completions"]),
        rewards=_from_json(stored["rewards"]),
        scaled_rewards=None if scaled is None else _from_json(scaled),
        **{name: stored[name] for name in kept if name in stored},
    )


def _to_array(logprobs: Sequence[float]) -> np.ndarray:
    """Return the numbers in float32 if that is exact, as it is for those of vLLM, otherwise in float64."""
    exact = np.array(logprobs, np.float64)
    short = exact.astype(np.float32)
    return short if np.array_equal(short, exact) else exact


def _to_json(rewards: Sequence[float]) -> list[float | None]:
    """Return null for each nan, which JSON does not have."""
    return [None if math.isnan(reward) else reward for reward in rewards]


def _from_json(rewards: Sequence[float | None]) -> list[float]:
    return [math.nan if reward is None else reward for reward in rewards]
