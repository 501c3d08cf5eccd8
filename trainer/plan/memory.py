"""The plan of a recipe under a launch: for each phase, what a GPU and a host hold, by part.

Phases: load, sample and score (stage rloo), train (forward and backward), update, save. Activations are those of the
stage's own code (passes.py), states are counted (states.py), and what neither says is a margin.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from rekatrain.data.errors import InputError
from rekatrain.trainer.models import check_quantization
from rekatrain.trainer.plan.live_memory import Parts
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.model_size import ModelShape, model_of
from rekatrain.trainer.plan.passes import Passes
from rekatrain.trainer.plan.states import States, count_states, is_bfloat16, quantization_of, reward_models
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from transformers import PretrainedConfig

# CUDA's context and NCCL's buffers, and what PyTorch's allocator cannot use of what it holds.
CONTEXT = 1.5 * GB
FRAGMENTATION = 0.06
# A process of this program on a CPU before it has a model: the interpreter and the libraries.
INTERPRETER = 0.55 * GB
# What DeepSpeed adds to it: a run of 36,000 parameters took 0.542 GB without and 0.592 GB with it.
DEEPSPEED = 0.05 * GB
# Prompts of stage rloo are not known before the data is read.
PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of a step with what it needs at its worst moment: of one GPU, and of a host for all its processes."""

    name: str
    gpu: Parts
    host: Parts = field(default_factory=Counter)

    @property
    def gpu_bytes(self) -> float:
        return self.gpu.total()

    @property
    def host_bytes(self) -> float:
        return self.host.total()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Whether and how a recipe fits a launch; everything is worked out when it is asked for."""

    recipe: Recipe
    launch: PlannedLaunch
    config: PretrainedConfig
    shape: ModelShape
    prompt_tokens: int

    @cached_property
    def states(self) -> States:
        """What is there all the time."""
        return count_states(self.recipe, self.shape, self.launch, casts=self.casts)

    @property
    def casts(self) -> bool:
        """Whether the stage computes in bfloat16 whatever the weights are."""
        section = {"sft": self.recipe.sft, "reward": self.recipe.reward, "rloo": self.recipe.rloo}[self.recipe.stage]
        return bool(section.get("bf16", self.recipe.stage != "rloo" and not self.launch.is_cpu))

    @property
    def checkpoints_activations(self) -> bool:
        """Whether activations are computed again in the backward pass; TRL's default is that they are."""
        if self.recipe.stage == "rloo":
            return bool(self.recipe.rloo.get("gradient_checkpointing", False))
        section = self.recipe.sft if self.recipe.stage == "sft" else self.recipe.reward
        return bool(section.get("gradient_checkpointing", True))

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of stage sft or reward that one GPU holds."""
        section = self.recipe.sft if self.recipe.stage == "sft" else self.recipe.reward
        # TRL's default is 1,024, whatever the model's context.
        length = int(section.get("max_length", min(1024, self.shape.context)) or self.shape.context)
        if length > self.shape.context:
            raise InputError(
                f"{self.recipe.stage}.max_length ({length}) exceeds the model's context of {self.shape.context} tokens"
            )
        return math.ceil(length / self.launch.sequence_parallel)

    @property
    def rloo(self) -> RLOOConfig:
        """The section of stage rloo."""
        return RLOOConfig(**self.recipe.rloo)

    @property
    def prompts(self) -> int:
        """Prompts of a step on one process."""
        return self.rloo.prompts_per_process(self.launch.num_gpus)

    @cached_property
    def passes(self) -> Passes:
        """The stage's passes at their largest."""
        if self.recipe.stage == "rloo" and self.launch.sequence_parallel > 1:
            raise InputError(
                "stage rloo has no sequence parallelism: a row's prompt and completion lie on one process. Shorten "
                "rloo.max_completion_length, set rloo.gradient_checkpointing, or lower rloo.micro_batch_tokens"
            )
        is_sharded = self.launch.engine == "deepspeed"
        return Passes(
            recipe=_computed_as(self.recipe, is_sharded and self.casts),
            config=self.config,
            num_layers=self.shape.num_layers,
            prompts=self.prompts if self.recipe.stage == "rloo" else 1,
            prompt_tokens=self.prompt_tokens,
            row_tokens=self.row_tokens if self.recipe.stage != "rloo" else 1,
            casts=self.casts and not is_sharded,
            reduces_at_once=is_sharded,
            is_cpu=self.launch.is_cpu,
        )

    def activations(self, *, checkpointing: bool) -> Parts:
        """The training pass's own memory, with and without checkpointing."""
        return Counter(_train_peak(self.passes, checkpointing))

    @cached_property
    def phases(self) -> list[Phase]:
        """Every phase, in order."""
        return [self._phase(name, *parts()) for name, parts in self._parts.items()]

    @property
    def fits(self) -> bool:
        """Whether no phase is overfull; those that need no pass to be run are asked first."""
        needs_pass = ("sample", "score", "train")
        names = sorted(self._parts, key=lambda name: name in needs_pass)
        return not any(self._is_overfull(self._phase(name, *self._parts[name]())) for name in names)

    @property
    def overfull(self) -> list[Phase]:
        """The phases that do not fit."""
        return [phase for phase in self.phases if self._is_overfull(phase)]

    @property
    def worst(self) -> Phase:
        """The phase that needs most of a GPU."""
        return max(self.phases, key=lambda phase: phase.gpu_bytes)

    def _is_overfull(self, phase: Phase) -> bool:
        host = self.launch.host_memory or math.inf
        return phase.gpu_bytes > self.launch.gpu_memory or phase.host_bytes > host

    @property
    def _parts(self) -> dict[str, Callable[[], tuple[Parts, Parts]]]:
        """What gives each phase's parts, of a GPU and of a host."""
        with_rollouts = {"sample": self._sample} if self.recipe.stage == "rloo" else {}
        if self.recipe.stage == "rloo" and self.rloo.beta:
            with_rollouts["score"] = self._score
        return {"load": self._load, **with_rollouts, "train": self._train, "update": self._update, "save": self._save}

    @cached_property
    def _standing(self) -> tuple[Parts, Parts]:
        states = self.states
        reward_gpu, reward_host = reward_models(self.recipe)
        others = {"optimizer": states.optimizer, "reference": states.reference, "reward model": reward_gpu}
        host = states.host + Counter({"reward model": reward_host * self.launch.gpus_per_node})
        return states.weights + Counter(others), host

    @property
    def _buffers(self) -> Parts:
        return Counter({"gathers and buckets": self.states.buffers})

    def _load(self) -> tuple[Parts, Parts]:
        """`from_pretrained` reads the weights into the host's memory, in every process, unless ZeRO-3 cuts them up."""
        if self.launch.is_cpu or self.launch.zero_stage == 3:
            return self.states.weights, Counter()
        loaded = self.states.weights["parameters"] * self.launch.gpus_per_node
        return self.states.weights, Counter({"weights being loaded": loaded})

    def _sample(self) -> tuple[Parts, Parts]:
        standing, host = self._standing
        if self.samples_elsewhere:
            return standing, host
        whole = Counter({"rollout weights": self.states.gathered, "decoding copies": self._decoding_copies})
        return standing + whole + _sample_peak(self.passes), host

    def _score(self) -> tuple[Parts, Parts]:
        standing, host = self._standing
        return standing + _score_peak(self.passes) + self._buffers, host

    def _train(self) -> tuple[Parts, Parts]:
        standing, host = self._standing
        parts = self.activations(checkpointing=self.checkpoints_activations)
        buffers = self._buffers
        if self.passes.reduces_at_once and self.launch.zero_stage < 3 and self.passes.num_micro_batches == 1:
            buffers = Counter()  # gradients come as activations go: phase update has them
        elif self.passes.keeps_gradients or self.passes.reduces_at_once:
            parts["gradients"] = int(self.states.gradients)
        if self._packs_under_a_mask:
            # Rows of several conversations have a mask in torch's own attention: of bools, and as the kernel takes it.
            parts["attention mask"] = (1 + 2) * self.row_tokens**2
        if quantization_of(self.recipe):
            parts["dequantized weight"] = 2 * self.shape.largest_linear
        return standing + parts + buffers, host

    def _update(self) -> tuple[Parts, Parts]:
        standing, host = self._standing
        return standing + Counter({"gradients": self.states.gradients}) + self._buffers, host

    def _save(self) -> tuple[Parts, Parts]:
        standing, host = self._standing
        is_gathered = self.launch.zero_stage == 3 and self.launch.num_gpus > 1
        gathered = 2.0 * self.shape.largest_module if is_gathered else 0.0
        if self.recipe.lora is not None:
            on_host = 4.0 * self.shape.num_adapter
        else:
            on_host = 2.0 * self.shape.num_base if is_gathered else min(5 * GB, 4.0 * self.shape.num_base)
        return standing + Counter({"gathers and buckets": gathered}), host + Counter({"weights to save": on_host})

    def _phase(self, name: str, gpu: Parts, host: Parts) -> Phase:
        gpu = Counter({part: size for part, size in gpu.items() if size})
        if self.launch.is_cpu:
            shared = {part: size / self.launch.gpus_per_node for part, size in host.items()}
            return Phase(name=name, gpu=gpu + Counter(shared) + Counter({"interpreter": self._interpreter}))
        standing = ("parameters", "adapters", "optimizer", "reference", "reward model")
        moving = sum(size for part, size in gpu.items() if part not in standing)
        margin = CONTEXT + FRAGMENTATION * moving
        interpreters = Counter({"interpreters": self._interpreter * self.launch.gpus_per_node})
        return Phase(name=name, gpu=gpu + Counter({"context, fragmentation": margin}), host=host + interpreters)

    @property
    def _interpreter(self) -> float:
        return INTERPRETER + (DEEPSPEED if self.launch.engine == "deepspeed" else 0.0)

    @property
    def samples_elsewhere(self) -> bool:
        """Whether servers on other GPUs sample."""
        return bool(self.recipe.rloo.get("vllm_server_base_url"))

    @property
    def _packs_under_a_mask(self) -> bool:
        is_flash = "flash" in str(self.recipe.model.get("attn_implementation"))
        return self.recipe.stage == "sft" and bool(self.recipe.sft.get("packing")) and not is_flash

    @property
    def _decoding_copies(self) -> float:
        """Ready copies of the linear layers (trainer/rloo/kernels/cpu/packed_weights.py)."""
        weights = self.shape.num_linear + self.shape.num_head + self.shape.num_adapter
        is_16_bit = is_bfloat16(self.recipe) or (self.launch.engine == "deepspeed" and self.casts)
        if is_16_bit:
            return 0.0
        return float(weights * (2 if self.casts else 4 if self.launch.is_cpu else 0))


def make_plan(recipe: Recipe, launch: PlannedLaunch, *, prompt_tokens: int | None = None) -> Plan:
    """Plan a recipe; InputError for what no amount of memory makes run."""
    check_quantization(recipe, has_gpu=not launch.is_cpu, zero_stage=launch.zero_stage)
    config, shape = model_of(recipe.stage, json.dumps(recipe.model), json.dumps(recipe.lora))
    if recipe.stage == "rloo":
        room = shape.context - RLOOConfig(**recipe.rloo).max_completion_length
        if room < 1:
            raise InputError(f"rloo.max_completion_length leaves no room for a prompt in a context of {shape.context}")
        prompt_tokens = min(prompt_tokens or PROMPT_TOKENS, room)
    return Plan(recipe=recipe, launch=launch, config=config, shape=shape, prompt_tokens=prompt_tokens or 0)


# Plans that differ in what no pass knows of (a ZeRO stage, a number of GPUs) share their passes.
@lru_cache(maxsize=256)
def _train_peak(passes: Passes, checkpointing: bool) -> Parts:
    return passes.train(checkpointing=checkpointing)


@lru_cache(maxsize=256)
def _score_peak(passes: Passes) -> Parts:
    return passes.score()


@lru_cache(maxsize=256)
def _sample_peak(passes: Passes) -> Parts:
    return passes.sample()


def _computed_as(recipe: Recipe, is_16_bit: bool) -> Recipe:
    """DeepSpeed casts the model itself to bfloat16: no weight is cast as it is used."""
    if not is_16_bit:
        return recipe
    return Recipe(**{**vars(recipe), "model": {**recipe.model, "dtype": "bfloat16"}})
