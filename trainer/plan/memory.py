"""Plan the memory of a recipe under a launch: bytes of each phase, by part, on a GPU and on a host.

Phases: load, sample and score (stage rloo), train (forward and backward), update, save. Activations are measured on the
stage's own code (passes.py), static memory is counted (states.py), and a margin covers the rest.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PretrainedConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.quantization import check_quantization
from rekatrain.trainer.plan.live_memory import Parts
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.model_size import ModelShape, model_of
from rekatrain.trainer.plan.passes import sample_peak, score_peak, train_peak
from rekatrain.trainer.plan.states import States, count_states, is_bfloat16, quantization_of, reward_models
from rekatrain.trainer.plan.workload import Workload, checkpoints_activations, make_workload, uses_bf16
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.recipe.optimizers import check_optim
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import check_zero
from rekatrain.trainer.rloo.kernels.block_mask import block_mask_bytes

# Margin of a GPU: bytes of CUDA's context and NCCL's buffers, and the fraction of the allocated memory that PyTorch's
# allocator loses to fragmentation. Both are assumptions, not measurements.
CONTEXT = 1.5 * GB
FRAGMENTATION = 0.06
# Bytes of the Python process before it has a model: 0.386 GB, without the pages of library files, which processes share
# and the kernel can drop.
INTERPRETER = 0.4 * GB
# Bytes that DeepSpeed adds to the process: a model of 36,000 parameters took 0.542 GB without it and 0.592 GB with it.
DEEPSPEED = 0.05 * GB
# Tokens assumed per prompt in stage rloo: the true number is not known before the data is read.
PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The peak memory of one phase of a step.

    gpu:  bytes of one GPU by part; without a GPU, bytes of one process
    host: bytes of one host by part, for all its processes
    """

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
    """The memory plan of a recipe under a launch. Everything is computed on first use.

    prompt_tokens: tokens per prompt (stage rloo; 0 in the other stages)
    """

    recipe: Recipe
    launch: PlannedLaunch
    config: PretrainedConfig
    shape: ModelShape
    prompt_tokens: int

    @cached_property
    def states(self) -> States:
        """Static memory: parameters, gradients, optimizer states."""
        return count_states(self.recipe, self.shape, self.launch, uses_bf16=self.uses_bf16)

    @property
    def uses_bf16(self) -> bool:
        """True if the stage computes in bfloat16, whatever the dtype of the weights is."""
        return uses_bf16(self.recipe, self.launch)

    @property
    def checkpoints_activations(self) -> bool:
        """True if the backward pass recomputes activations."""
        return checkpoints_activations(self.recipe)

    @property
    def rloo(self) -> RLOOConfig:
        """The recipe's section `rloo`."""
        return RLOOConfig(**self.recipe.rloo)

    @cached_property
    def workload(self) -> Workload:
        """The largest passes of one process; InputError for lengths that the stage cannot run."""
        return make_workload(self.recipe, self.launch, self.config, self.shape, self.prompt_tokens)

    @property
    def num_prompts(self) -> int:
        """Prompts per step of one process (stage rloo)."""
        return self.workload.num_prompts

    def activations(self, *, checkpointing: bool) -> Parts:
        """Return the peak of the training pass in bytes by part, static memory excluded."""
        return Counter(train_peak(self.workload, checkpointing))

    @cached_property
    def phases(self) -> list[Phase]:
        """All phases, in the order in which they run."""
        return [self._phase(name, *parts()) for name, parts in self._phase_parts.items()]

    @property
    def fits(self) -> bool:
        """True if every phase fits. Phases that need no measurement are checked first, because they are cheap."""
        measured = ("sample", "score", "train")
        names = sorted(self._phase_parts, key=lambda name: name in measured)
        return not any(self._is_overfull(self._phase(name, *self._phase_parts[name]())) for name in names)

    @property
    def overfull(self) -> list[Phase]:
        """The phases that do not fit."""
        return [phase for phase in self.phases if self._is_overfull(phase)]

    @property
    def worst(self) -> Phase:
        """The phase that needs the most GPU memory."""
        return max(self.phases, key=lambda phase: phase.gpu_bytes)

    def _is_overfull(self, phase: Phase) -> bool:
        host = self.launch.host_memory or math.inf
        return phase.gpu_bytes > self.launch.gpu_memory or phase.host_bytes > host

    @property
    def _phase_parts(self) -> dict[str, Callable[[], tuple[Parts, Parts]]]:
        """For each phase, a function that returns its parts of a GPU and of a host."""
        with_rollouts = {"sample": self._sample} if self.recipe.stage == "rloo" else {}
        if self.recipe.stage == "rloo" and self.rloo.beta:
            with_rollouts["score"] = self._score
        return {"load": self._load, **with_rollouts, "train": self._train, "update": self._update, "save": self._save}

    @cached_property
    def _static(self) -> tuple[Parts, Parts]:
        states = self.states
        reward_gpu, reward_host = reward_models(self.recipe)
        others = {"optimizer": states.optimizer, "reference": states.reference, "reward model": reward_gpu}
        host = states.host + Counter({"reward model": reward_host * self.launch.gpus_per_node})
        return states.weights + Counter(others), host

    @property
    def _buffers(self) -> Parts:
        return Counter({"gathers and buckets": self.states.buffers})

    def _load(self) -> tuple[Parts, Parts]:
        # `from_pretrained` reads all weights into host memory, in every process, unless ZeRO-3 shards them.
        if self.launch.is_cpu or self.launch.zero_stage == 3:
            return self.states.weights, Counter()
        loaded = self.states.weights["parameters"] * self.launch.gpus_per_node
        return self.states.weights, Counter({"weights being loaded": loaded})

    def _sample(self) -> tuple[Parts, Parts]:
        static, host = self._static
        if self.samples_elsewhere:
            return static, host
        whole = Counter({"rollout weights": self.states.gathered, "decoding copies": self._decoding_copies})
        return static + whole + sample_peak(self.workload), host

    def _score(self) -> tuple[Parts, Parts]:
        static, host = self._static
        return static + score_peak(self.workload) + self._block_mask + self._buffers, host

    def _train(self) -> tuple[Parts, Parts]:
        static, host = self._static
        parts = self.activations(checkpointing=self.checkpoints_activations)
        buffers = self._buffers
        reduces_in_backward, keeps_gradients = self.workload.reduces_in_backward, self.workload.keeps_gradients
        if reduces_in_backward and self.launch.zero_stage < 3 and self.workload.num_micro_batches == 1:
            buffers = Counter()  # gradients replace activations during the backward pass: phase update counts them
        elif keeps_gradients or reduces_in_backward:
            parts["gradients"] = int(self.states.gradients)
        if quantization_of(self.recipe):
            parts["dequantized weight"] = 2 * self.shape.largest_linear
        return static + parts + self._block_mask + buffers, host

    def _update(self) -> tuple[Parts, Parts]:
        static, host = self._static
        parts = Counter({"gradients": self.states.gradients, "optimizer's temporaries": self.states.temporary})
        return static + parts + self._buffers, host

    def _save(self) -> tuple[Parts, Parts]:
        static, host = self._static
        is_gathered = self.launch.zero_stage == 3 and self.launch.num_gpus > 1
        gathered = 2.0 * self.shape.largest_module if is_gathered else 0.0
        if self.recipe.lora is not None:
            on_host = 4.0 * self.shape.num_adapter
        else:
            on_host = 2.0 * self.shape.num_base if is_gathered else min(5 * GB, 4.0 * self.shape.num_base)
        return static + Counter({"gathers and buckets": gathered}), host + Counter({"weights to save": on_host})

    def _phase(self, name: str, gpu: Parts, host: Parts) -> Phase:
        gpu = Counter({part: size for part, size in gpu.items() if size})
        if self.launch.is_cpu:
            per_process = {part: size / self.launch.gpus_per_node for part, size in host.items()}
            return Phase(name=name, gpu=gpu + Counter(per_process) + Counter({"interpreter": self._interpreter}))
        static = ("parameters", "adapters", "optimizer", "reference", "reward model")
        dynamic = sum(size for part, size in gpu.items() if part not in static)
        margin = CONTEXT + FRAGMENTATION * dynamic
        interpreters = Counter({"interpreters": self._interpreter * self.launch.gpus_per_node})
        return Phase(name=name, gpu=gpu + Counter({"context, fragmentation": margin}), host=host + interpreters)

    @property
    def _interpreter(self) -> float:
        return INTERPRETER + (DEEPSPEED if self.launch.engine == "deepspeed" else 0.0)

    @property
    def samples_elsewhere(self) -> bool:
        """True if vLLM servers on other GPUs sample the completions."""
        return bool(self.recipe.rloo.get("vllm_server_base_url"))

    @property
    def _block_mask(self) -> Parts:
        """Bytes of the blocks by which FlexAttention skips what a token does not see (stage rloo, on a GPU)."""
        if self.recipe.stage != "rloo" or self.launch.is_cpu:
            return Counter()
        return Counter({"attention mask": block_mask_bytes(self.workload.micro_batch_tokens)})

    @property
    def _decoding_copies(self) -> float:
        """Bytes of the sampler's copies of linear layers (kernels/cpu.py) and of adapters (sampler/adapters.py)."""
        weights, adapter = self.shape.num_linear + self.shape.num_head + self.shape.num_adapter, self.shape.num_adapter
        is_16_bit = is_bfloat16(self.recipe) or (self.launch.engine == "deepspeed" and self.uses_bf16)
        if is_16_bit:
            return 2.0 * adapter
        casts = self.uses_bf16 or (self.recipe.stage == "rloo" and self.recipe.rloo.get("rollout_dtype") is not None)
        if casts:
            return 2.0 * (weights + adapter)
        return 4.0 * (weights * self.launch.is_cpu + adapter)


def make_plan(recipe: Recipe, launch: PlannedLaunch, *, prompt_tokens: int | None = None) -> Plan:
    """Plan a recipe; raise InputError for a recipe that cannot run with any amount of memory.

    prompt_tokens: tokens per prompt in stage rloo; None: 256
    """
    check_quantization(recipe, has_gpu=not launch.is_cpu, zero_stage=launch.zero_stage)
    check_optim(recipe, is_deepspeed=launch.engine == "deepspeed")
    config, shape = model_of(recipe.stage, json.dumps(recipe.model), json.dumps(recipe.lora))
    if recipe.stage == "rloo":
        check_zero(recipe, launch.zero_stage)
        room = shape.context - RLOOConfig(**recipe.rloo).max_completion_length
        if room < 1:
            raise InputError(f"rloo.max_completion_length leaves no room for a prompt in a context of {shape.context}")
        prompt_tokens = min(prompt_tokens or PROMPT_TOKENS, room)
    return Plan(recipe=recipe, launch=launch, config=config, shape=shape, prompt_tokens=prompt_tokens or 0)
