"""A step's rollouts from servers: weights published first, and the next step's batch sampled while this one trains."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from rekatrain.data.chat import FinishReason
from rekatrain.trainer.models import Policy
from rekatrain.trainer.rloo.rollouts import Group, Lap, roll_out
from rekatrain.trainer.rloo.sampler.in_process import Completion
from rekatrain.trainer.rloo.sampler.vllm.sampler import ServedWeights, VLLMSampler
from rekatrain.trainer.rloo.sampler.vllm.transfer import WeightTransfer
from rekatrain.trainer.rloo.sampler.vllm.weights import publish, send
from rekatrain.trainer.rloo.setup import RunSetup

Rolled = tuple[list[Group], list[Group]]
Json = dict[str, Any]  # Any: a JSON value


class ServerRollouts:
    """Source of groups that vLLM servers sample: the `RolloutSource` of a run with servers.

    On policy, a step's batch is sampled from the weights that it then trains. With `max_staleness` 1 it has been
    sampled while the batch before it was trained, from the weights of one update ago. The servers change weights
    between two batches, when nothing is in flight. A batch that waits is part of a checkpoint: a resumed run trains it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        task: RunSetup,
        run_folder: Path,
    ) -> None:
        self._accelerator, self._policy, self._task = accelerator, policy, task
        self._run_folder, self._prompt_indices = run_folder, task.prompt_indices(accelerator)
        self.sampler = VLLMSampler(task.tokenizer, task.config, vocab_size=policy.config.vocab_size)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._waiting: dict[int, Future[Rolled]] = {}
        self._staleness = self._num_retries = 0
        self._transfer: WeightTransfer | None = None
        if task.config.max_staleness:
            accelerator.register_for_checkpointing(self)

    def __call__(self, step: int, lap: Lap) -> Rolled:
        """The step's groups, as `roll_out` gives them; from the weights of `step` or `step - 1` updates."""
        waiting = self._waiting.pop(step, None)
        self._staleness = int(waiting is not None)
        rolled = waiting.result() if waiting else None
        lap("wait")
        self._num_retries, self.sampler.num_retries = self.sampler.num_retries, 0
        config = self._task.config
        goes_ahead = config.max_staleness and step + 1 < config.max_steps
        if rolled is None or goes_ahead:
            self.sampler.weights = self._publish(step)
            lap("publish")
        if rolled is None:
            rolled = roll_out(self.sampler, self._task, self._prompt_indices, step, lap)
        if goes_ahead:
            self._waiting[step + 1] = self._thread.submit(
                roll_out, self.sampler, self._task, self._prompt_indices, step + 1, lambda phase: None
            )
        return rolled

    def _publish(self, num_updates: int) -> ServedWeights:
        urls = self._task.config.vllm_server_urls
        if self._task.config.vllm_weight_transfer == "folder":
            return publish(self._accelerator, self._policy, self._run_folder, num_updates)
        if self._transfer is None:
            self._transfer = WeightTransfer(urls, self._policy, rank=self._accelerator.process_index)
        return send(self._accelerator, self._transfer, urls, num_updates)

    def metrics(self) -> dict[str, float]:
        """Updates between the weights that sampled the last batch and those it trained; groups asked for again."""
        return {"staleness": self._staleness, "groups_sampled_again": self._num_retries}

    def state_dict(self) -> Json:
        """The batches that wait, of all processes; Accelerate saves it. Waits for what is being sampled."""
        places = {id(prompt): place for place, prompt in enumerate(self._task.prompts)}
        mine = [
            {"step": step, "is_replaced": is_replaced, **_to_json(group, places)}
            for step, future in self._waiting.items()
            for is_replaced, groups in enumerate(future.result())
            for group in groups
        ]
        return {"groups": gather_object(mine)}

    def load_state_dict(self, state: Json) -> None:
        """Take up the batches of a checkpoint, each process its own prompts of a step."""
        config = self._task.config
        share = config.prompts_per_process(self._accelerator.num_processes)
        rolled: dict[int, Rolled] = {}
        for stored in state["groups"]:
            of_step = rolled.setdefault(stored["step"], ([], []))
            if stored["prompt_index"] % config.prompts_per_step // share == self._accelerator.process_index:
                of_step[stored["is_replaced"]].append(_from_json(stored, self._task))
        for step, groups in rolled.items():
            self._waiting[step] = Future()
            self._waiting[step].set_result(groups)


def _to_json(group: Group, places: dict[int, int]) -> Json:
    return {
        "prompt_index": group.prompt_index,
        "prompt": places[id(group.prompt)],
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
        "rewards": group.rewards,
        "rewards_by_name": {name: list(values) for name, values in group.rewards_by_name.items()},
        "reward_errors": [dict(errors) for errors in group.reward_errors],
        "is_in_loss": group.is_in_loss,
    }


def _from_json(stored: Json, task: RunSetup) -> Group:
    completions = [
        Completion(
            **{**fields, "finish_reason": FinishReason(fields["finish_reason"]), "forced": range(*fields["forced"])}
        )
        for fields in stored["completions"]
    ]
    kept = ("prompt_index", "texts", "rewards", "rewards_by_name", "reward_errors", "is_in_loss")
    return Group(
        prompt=task.prompts[stored["prompt"]], completions=completions, **{name: stored[name] for name in kept}
    )
