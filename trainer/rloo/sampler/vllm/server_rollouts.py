"""Each step's rollouts from vLLM servers: who samples which batch when, and from which weights.

W0, W1, ... are the weights after 0, 1, ... updates; batch n is the one that step n trains. Sampling includes scoring.

On policy (`max_staleness: 0`), the main thread samples a batch and then trains it:

    main thread  | publish W0 | sample 0 from W0 | train 0 -> W1    | publish W1 | sample 1 from W1 | train 1 -> W2    |

One step off policy (`max_staleness: 1`), a background thread samples the next batch while the main thread trains:

    main thread  | publish W0 | sample 0 from W0 | train 0 -> W1    | publish W1 | train 1 -> W2    | publish W2 | ...
    background   |            |                  | sample 1 from W0 |            | sample 2 from W1 |            | ...

No request is in flight when weights are published, so which weights draw a token does not depend on time.

Up to n steps off policy (`max_staleness: n`, 2 or more), batches v to v + n are queued as soon as W_v is published, and
servers take group after group from them, so they do not wait for the trainer while the queue has room:

    main thread  | publish W0 | wait for 0 | train 0 -> W1 | publish W1 | wait for 1 | train 1 -> W2 | publish W2 | ...
    background   |            | sample 0, 1, ..., n                     | sample ..., n + 1                       | ...

Weights are published with requests in flight (live_weights.py): a completion goes on with the new weights, and each
token has the version that drew it. Batch b begins when W_(b - n) is published, so no token is more than n updates old.

Prompts are trained in the order in which they are scheduled, by the recipe's seed, and not as groups finish: that would
train short completions first, and would make the data of a step depend on time.

The queue, `ServerRollouts._queue`, is part of a checkpoint: scored batches, and of the other batches the groups that
are sampled, which are scored again. Groups in flight are sampled again, from the same seeds and the weights of then.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel

from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.probe import TrainingProbe, choose_texts, run_probe
from rekatrain.trainer.processes.interruption import Abandoned
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.rollouts import Lap, abandonable, roll_out
from rekatrain.trainer.rloo.sampler.vllm.group_requests import ServedWeights
from rekatrain.trainer.rloo.sampler.vllm.live_weights import check_live, publish_live, update_in_flight
from rekatrain.trainer.rloo.sampler.vllm.sampler import VLLMSampler
from rekatrain.trainer.rloo.sampler.vllm.sleep import SleepingServers
from rekatrain.trainer.rloo.sampler.vllm.stored_groups import (
    completions_from_json,
    completions_to_json,
    group_from_json,
    group_to_json,
)
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
        num_threads = setup.config.max_staleness + 2  # a batch each, and a probe
        self._background = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="rollouts")
        self._queue: dict[int, Future[Rolled]] = {}
        self._published: int | None = None
        self._probing: Future[None] | None = None
        self._num_waiting = self._num_retries = 0
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
        """Return this process's groups of `step`, as `roll_out` does; `max_staleness` limits the age of their weights.

        Also start to sample later batches in the background, as far as `max_staleness` allows.
        """
        staleness, last = self._setup.config.max_staleness, self._setup.config.max_steps - 1
        self._num_waiting = len(self.sampler.finished)
        # Updates in flight: publish at once, so that no server waits and completions go on with the newest weights.
        if staleness > 1:
            self._publish(step)
            lap("publish")
            self._sample_ahead(range(step, min(step + staleness, last) + 1))
        # Take this step's batch from the queue, and wait until it is sampled.
        queued = self._queue.get(step)
        rolled = self._unless_interrupted(queued.result) if queued else None
        self._queue.pop(step, None)
        self.sampler.forget(step)
        lap("wait")
        self._num_retries = self.sampler.take_retries()
        # Updates between batches: publish the weights that the next batch to be sampled needs.
        if rolled is None or (staleness == 1 and step < last):
            self._publish(step)
            lap("publish")
        if rolled is None:
            rolled = self._unless_interrupted(
                partial(roll_out, self.sampler, self._setup, self._prompt_indices, step, lap)
            )
            self.rest()
        if staleness == 1:
            self._sample_ahead(range(step + 1, min(step + 1, last) + 1))
        return rolled

    def _sample_ahead(self, steps: range) -> None:
        for step in steps:
            if step not in self._queue:
                self._queue[step] = self._background.submit(
                    roll_out, self.sampler, self._setup, self._prompt_indices, step, lambda phase: None
                )

    def _unless_interrupted(self, function: Callable[[], Rolled]) -> Rolled:
        try:
            return abandonable(self._accelerator, function)
        except Abandoned:
            self._is_abandoned = True
            self.sampler.cancel()
            raise

    def _publish(self, num_updates: int) -> ServedWeights:
        """Publish the weights unless they are published already; every process must call this."""
        served, config = self.sampler.served, self._setup.config
        if self._published == num_updates:
            self._wake()
            return served.known()
        probe, is_nccl = run_probe(self._policy, self._texts), config.vllm_weight_transfer == "nccl"
        if is_nccl and self._transfer is None:
            self._transfer = WeightTransfer(config.vllm_server_urls, self._policy, rank=self._accelerator.process_index)
        if config.max_staleness > 1:
            self._publish_live(num_updates, probe)
        elif self._transfer is not None:
            served.weights = send(self._accelerator, self._transfer, config.vllm_server_urls, num_updates, probe)
        else:
            served.weights = publish(self._accelerator, self._policy, self._run_folder, num_updates, probe)
        served.version = self._published = num_updates
        self._wake()
        return served.known()

    def _wake(self) -> None:
        weights = self.sampler.served.weights
        if self._sleeping is not None and isinstance(weights, AdapterWeights | FolderWeights):
            self._sleeping.wake(weights)

    def rest(self) -> None:
        """Have servers that share the GPUs sleep until weights are published again; every process must call this."""
        if self._sleeping is not None:
            self._sleeping.sleep()

    def _publish_live(self, num_updates: int, probe: TrainingProbe) -> None:
        served, config = self.sampler.served, self._setup.config
        weights = publish_live(
            self._accelerator,
            self._policy,
            self._run_folder,
            num_updates,
            probe,
            is_sent=self._transfer is not None,
        )

        def begin() -> None:
            served.weights, served.version = weights, num_updates

        served.is_updating = True
        update_in_flight(
            self._accelerator,
            config.vllm_server_urls,
            weights,
            begin,
            transfer=self._transfer,
            request_timeout=config.vllm_request_timeout,
        )
        served.is_updating = False
        # Hold the servers against the probe, without waiting; one that fails ends the run at the next update.
        if self._probing is None or self._probing.done():
            if self._probing is not None:
                self._probing.result()
            self._probing = self._background.submit(
                check_live, config.vllm_server_urls, weights, request_timeout=config.vllm_request_timeout
            )

    def sampler_of(self, config: EvaluateConfig, num_updates: int) -> VLLMSampler:
        """Return a sampler of the weights after `num_updates` updates with the settings of an evaluation.

        Every process must call this. Where weights are not updated in flight, it waits for the batch that is sampled.
        """
        settings = replace(
            self._setup.config,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            per_device_generation_batch_size=max(config.per_device_generation_batch_size, config.num_generations),
            num_generations=config.num_generations,
            max_staleness=0,
            **FILTERS_OFF,
        )
        if self._setup.config.max_staleness == 1:
            self._unless_interrupted(self._wait_for_queue)
        sampler = self._make_sampler(settings)
        sampler.served.weights = self._publish(num_updates)
        return sampler

    def _wait_for_queue(self) -> Rolled:
        for future in self._queue.values():
            future.exception()  # the step that takes it raises it
        return [], []

    def _make_sampler(self, config: RLOOConfig) -> VLLMSampler:
        size, rank = self._policy.config.vocab_size, self._accelerator.process_index
        return VLLMSampler(self._setup.tokenizer, config, vocab_size=size, rank=rank)

    def close(self) -> None:
        """End all sampling: a run that ends early, or by an error, does not wait for its queue."""
        self._background.shutdown(wait=False, cancel_futures=True)
        self.sampler.close()

    def metrics(self) -> dict[str, float]:
        """Return the finished groups that waited in this process's queue, and the groups that were requested again."""
        return {"queued_groups": self._num_waiting, "rollout_retries": self._num_retries}

    def state_dict(self) -> Json:
        """Return the queue of all processes: the scored groups, and the groups that are sampled only.

        With `max_staleness` 1 it waits for the batch that is sampled, unless the run is interrupted, so that a resumed
        run does not differ from one that was not.
        """
        if self._setup.config.max_staleness == 1 and not self._is_abandoned:
            for future in self._queue.values():
                future.result()
        scored = [step for step, future in self._queue.items() if future.done() and not _has_failed(future)]
        by_rank: list[list[int]] = gather_object([scored])
        everywhere = set(by_rank[0]).intersection(*by_rank)
        indices = {id(prompt): index for index, prompt in enumerate(self._setup.prompts)}
        groups = [
            {"step": step, "is_replaced": is_replaced, **group_to_json(group, indices)}
            for step in sorted(everywhere)
            for is_replaced, groups in enumerate(self._queue[step].result())
            for group in groups
        ]
        sampled = [
            {"key": list(key), "completions": completions_to_json(completions)}
            for key, completions in dict(self.sampler.finished).items()
            if key[2] not in everywhere
        ]
        return {"groups": gather_object(groups), "sampled": gather_object(sampled)}

    def load_state_dict(self, state: Json) -> None:
        """Restore the queue of a checkpoint; each process keeps the groups of the prompts that it samples."""
        config = self._setup.config
        per_process = config.prompts_per_process(self._accelerator.num_processes)
        rolled: dict[int, Rolled] = {}
        for stored in state["groups"]:
            of_step = rolled.setdefault(stored["step"], ([], []))
            # A replacement's index is `prompts_per_step` higher per round.
            if stored["prompt_index"] % config.prompts_per_step // per_process == self._accelerator.process_index:
                of_step[stored["is_replaced"]].append(group_from_json(stored, self._setup))
        for step, groups in rolled.items():
            self._queue[step] = Future()
            self._queue[step].set_result(groups)
        for stored in state.get("sampled", []):
            self.sampler.finished[tuple(stored["key"])] = completions_from_json(stored["completions"])


def _has_failed(future: Future[Rolled]) -> bool:
    return future.cancelled() or future.exception() is not None
