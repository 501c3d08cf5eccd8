"""Each step's rollouts from vLLM servers: who samples which batch when, and from which weights.

W0, W1, ... are the weights after 0, 1, ... updates; batch n is the one that step n trains. Sampling includes scoring.

On policy (`max_staleness: 0`), the main thread samples a batch and then trains it:

    main thread  | publish W0 | sample 0 from W0 | train 0 -> W1    | publish W1 | sample 1 from W1 | train 1 -> W2    |

One step off policy (`max_staleness: 1`), a background thread samples the next batch while the main thread trains:

    main thread  | publish W0 | sample 0 from W0 | train 0 -> W1    | publish W1 | train 1 -> W2    | publish W2 | ...
    background   |            |                  | sample 1 from W0 |            | sample 2 from W1 |            | ...
    queue        |            |                  |                  | batch 1    |                  | batch 2    | ...

The queue, `ServerRollouts._queue`, holds the batch that the background thread samples or has sampled: at most one. It
is part of a checkpoint, so a resumed run trains that batch. The servers load published weights between two batches,
when no request is in flight (weights.py).
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel

from rekatrain.data.chat import FinishReason
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.probe import choose_texts, run_probe
from rekatrain.trainer.processes.interruption import Abandoned
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.rollouts import Lap, abandonable, roll_out
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.sampler import ServedWeights, VLLMSampler
from rekatrain.trainer.rloo.sampler.vllm.sleep import SleepingServers
from rekatrain.trainer.rloo.sampler.vllm.transfer import WeightTransfer
from rekatrain.trainer.rloo.sampler.vllm.weights import AdapterWeights, FolderWeights, publish, send
from rekatrain.trainer.rloo.setup import RunSetup

# Options of training that an evaluation does not have.
FILTERS_OFF: dict[str, Any] = {"top_p": 1.0, "top_k": None, "reasoning_budget": None, "overlong_buffer": None}
# Groups to train on, and groups that dynamic sampling replaced.
Rolled = tuple[list[Group], list[Group]]


class ServerRollouts:
    """Groups sampled by vLLM servers: the `RolloutSource` of a run with servers."""

    def __init__(self, accelerator: Accelerator, policy: Policy, setup: RunSetup, run_folder: Path) -> None:
        self._accelerator, self._policy, self._setup = accelerator, policy, setup
        self._run_folder, self._prompt_indices = run_folder, setup.prompt_indices(accelerator)
        self.sampler = self._make_sampler(setup.config)
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._queue: dict[int, Future[Rolled]] = {}
        self._staleness = self._num_retries = 0
        self._is_abandoned = False
        self._transfer: WeightTransfer | None = None
        self._sleeping = None
        if setup.config.vllm_enable_sleep_mode:
            self._sleeping = SleepingServers(accelerator, setup.config, has_adapter=isinstance(policy, PeftModel))
            self.rest()
        prompts = [prompt.ids for prompt in setup.prompts]
        context = max(map(len, prompts)) + setup.config.max_completion_length  # at least this, by checks.py
        self._texts = [text[: context - 1] for text in choose_texts(setup.tokenizer, prompts)]

    def __call__(self, step: int, lap: Lap) -> Rolled:
        """Return this process's groups of `step`, as `roll_out` does, from the weights of `step` or `step - 1` updates.

        With `max_staleness` 1 also start to sample the next step's batch in the background.
        """
        # Take this step's batch from the queue, and wait until it is sampled: then no request is in flight.
        queued = self._queue.get(step)
        self._staleness = int(queued is not None)
        rolled = self._unless_interrupted(queued.result) if queued else None
        self._queue.pop(step, None)
        lap("wait")
        self._num_retries, self.sampler.num_retries = self.sampler.num_retries, 0
        config = self._setup.config
        samples_ahead = config.max_staleness and step + 1 < config.max_steps
        # Publish the weights that the next batch to be sampled needs.
        if rolled is None or samples_ahead:
            self.sampler.weights = self._publish(step)
            lap("publish")
        if rolled is None:
            rolled = self._unless_interrupted(
                partial(roll_out, self.sampler, self._setup, self._prompt_indices, step, lap)
            )
            self.rest()
        if samples_ahead:
            self._queue[step + 1] = self._background.submit(
                roll_out, self.sampler, self._setup, self._prompt_indices, step + 1, lambda phase: None
            )
        return rolled

    def _unless_interrupted(self, function: Callable[[], Rolled]) -> Rolled:
        try:
            return abandonable(self._accelerator, function)
        except Abandoned:
            self._is_abandoned = True
            self.sampler.cancel()
            raise

    def _publish(self, num_updates: int) -> ServedWeights:
        weights = self._publish_asleep(num_updates)
        if self._sleeping is not None and isinstance(weights, AdapterWeights | FolderWeights):
            self._sleeping.wake(weights)
        return weights

    def rest(self) -> None:
        """Have servers that share the GPUs sleep until weights are published again; every process must call this."""
        if self._sleeping is not None:
            self._sleeping.sleep()

    def _publish_asleep(self, num_updates: int) -> ServedWeights:
        urls = self._setup.config.vllm_server_urls
        probe = run_probe(self._policy, self._texts)
        if self._setup.config.vllm_weight_transfer == "folder":
            return publish(self._accelerator, self._policy, self._run_folder, num_updates, probe)
        if self._transfer is None:
            self._transfer = WeightTransfer(urls, self._policy, rank=self._accelerator.process_index)
        return send(self._accelerator, self._transfer, urls, num_updates, probe)

    def sampler_of(self, config: EvaluateConfig, num_updates: int) -> VLLMSampler:
        """Return a sampler of the weights after `num_updates` updates with the settings of an evaluation.

        Every process must call this, while no request is in flight.
        """
        settings = replace(
            self._setup.config,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            per_device_generation_batch_size=max(config.per_device_generation_batch_size, config.num_generations),
            num_generations=config.num_generations,
            **FILTERS_OFF,
        )
        sampler = self._make_sampler(settings)
        sampler.weights = self._publish(num_updates)
        return sampler

    def _make_sampler(self, config: RLOOConfig) -> VLLMSampler:
        size, rank = self._policy.config.vocab_size, self._accelerator.process_index
        return VLLMSampler(self._setup.tokenizer, config, vocab_size=size, rank=rank)

    def metrics(self) -> dict[str, float]:
        """Return the staleness of the last batch in updates, and the number of groups that were requested again."""
        return {"staleness": self._staleness, "rollout_retries": self._num_retries}

    def state_dict(self) -> Json:
        """Return the queued batch of all processes, once it is sampled; a checkpoint holds it.

        An interrupted run does not wait for it. The resumed run samples it again, from the weights of then.
        """
        is_sampled = all(future.done() and not future.exception() for future in self._queue.values())
        if self._is_abandoned and not all(gather_object([is_sampled])):
            return {"groups": []}
        indices = {id(prompt): index for index, prompt in enumerate(self._setup.prompts)}
        mine = [
            {"step": step, "is_replaced": is_replaced, **_to_json(group, indices)}
            for step, future in self._queue.items()
            for is_replaced, groups in enumerate(future.result())
            for group in groups
        ]
        return {"groups": gather_object(mine)}

    def load_state_dict(self, state: Json) -> None:
        """Restore the queued batch of a checkpoint; each process keeps the groups of the prompts that it samples."""
        config = self._setup.config
        per_process = config.prompts_per_process(self._accelerator.num_processes)
        rolled: dict[int, Rolled] = {}
        for stored in state["groups"]:
            of_step = rolled.setdefault(stored["step"], ([], []))
            # A replacement's index is `prompts_per_step` higher per round.
            if stored["prompt_index"] % config.prompts_per_step // per_process == self._accelerator.process_index:
                of_step[stored["is_replaced"]].append(_from_json(stored, self._setup))
        for step, groups in rolled.items():
            self._queue[step] = Future()
            self._queue[step].set_result(groups)


def _to_json(group: Group, indices: dict[int, int]) -> Json:
    """Return a JSON object for a group; `indices` gives the index in the data of each prompt by its `id`."""
    return {
        "prompt_index": group.prompt_index,
        "prompt": indices[id(group.prompt)],
        "completions": [
            {
                "ids": completion.ids,
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason.value,
                "forced": [completion.forced.start, completion.forced.stop],
            }
            for completion in group.completions
        ],
        "texts": group.texts,
        "rewards": [None if math.isnan(reward) else reward for reward in group.rewards],  # JSON has no nan
        "rewards_by_name": {name: list(values) for name, values in group.rewards_by_name.items()},
        "reward_errors": [dict(errors) for errors in group.reward_errors],
        "is_in_loss": group.is_in_loss,
        "reward_metrics": [dict(metrics) for metrics in group.reward_metrics],
        "reward_notes": [dict(notes) for notes in group.reward_notes],
        "scaled_rewards": None
        if group.scaled_rewards is None
        else [None if math.isnan(reward) else reward for reward in group.scaled_rewards],
    }


def _from_json(stored: Json, setup: RunSetup) -> Group:
    completions = [
        Completion(
            **{**fields, "finish_reason": FinishReason(fields["finish_reason"]), "forced": range(*fields["forced"])}
        )
        for fields in stored["completions"]
    ]
    scaled = stored.get("scaled_rewards")
    kept = ("prompt_index", "texts", "rewards_by_name", "reward_errors", "is_in_loss", "reward_metrics", "reward_notes")
    return Group(
        prompt=setup.prompts[stored["prompt"]],
        completions=completions,
        rewards=[math.nan if reward is None else reward for reward in stored["rewards"]],
        scaled_rewards=None if scaled is None else [math.nan if reward is None else reward for reward in scaled],
        **{name: stored[name] for name in kept if name in stored},
    )
