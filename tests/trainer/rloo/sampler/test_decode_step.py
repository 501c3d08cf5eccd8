"""A decoding step is a function of tensors on the device: recorded once, it can be replayed, as a CUDA graph is."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.trainer.rloo.kernels.grouped_attention import FIRST_ROOM, decoder_and_head, run_decoder
from rekatrain.trainer.rloo.sampler.decode_step import MAX_GRAPHS, CudaGraphs, DecodeStep, EagerCalls
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.in_process import Completion, Sampler
from rekatrain.trainer.rloo.sampler.static_cache import StaticCache, bucket
from tests.conftest import tiny_llama
from tests.helpers.recorded_calls import RecordedCalls, Recording

TEXTS = ["human: What is 2+2? <sep> assistant:", "a", "human: 17 + 25 = <sep> assistant:", "Be brief.", "human:"]
LENGTH = 2 * FIRST_ROOM + 10


@pytest.fixture
def policy(ending_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A policy in float64, so that no draw depends on rounding; completions of 1 to LENGTH tokens."""
    model = ending_model.double()
    with torch.no_grad():
        model.lm_head.weight[:, 0] *= 0.5
        model.lm_head.weight[model.config.eos_token_id, 0] = 1.2
    return model


def sample(
    policy: Any, tokenizer: PreTrainedTokenizerFast, batch_size: int, *, num_late: int | None = None, **options: Any
) -> tuple[list[Completion], RecordedCalls]:
    """Sample as on a CPU, or with `num_late` as on a GPU, by recorded steps."""
    settings: dict[str, Any] = {"max_completion_length": LENGTH, "temperature": 0.9, **options}
    sampler = Sampler(policy, tokenizer, batch_size=batch_size, **settings)
    calls = RecordedCalls()
    if num_late is not None:
        sampler.num_late, sampler.make_calls = num_late, lambda: calls
    prompts = [encode_text(text, tokenizer) for text in TEXTS]
    groups = sampler.sample(prompts, [(5, index) for index in range(len(TEXTS))], 3)
    return [completion for group in groups for completion in group], calls


@pytest.mark.parametrize(
    ("batch_size", "num_late", "options"),
    [
        (64, 0, {}),
        (6, 4, {}),
        (9, 2, {"top_p": 0.9, "top_k": 40}),
        (6, 4, {"reasoning_budget": 5}),
        (6, 1, {"max_completion_length": 3}),
    ],
)
def test_replayed_steps_draw_the_same_completions(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    num_late: int,
    options: dict[str, Any],
) -> None:
    expected, _ = sample(policy, tokenizer, 64, **options)
    actual, calls = sample(policy, tokenizer, batch_size, num_late=num_late, **options)
    for one, other in zip(actual, expected, strict=True):
        assert (one.ids, one.finish_reason, one.forced) == (other.ids, other.finish_reason, other.forced)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
        assert one.cutoffs == pytest.approx(other.cutoffs, abs=1e-6)
    if "max_completion_length" not in options:
        longest = max(len(completion.ids) for completion in expected)
        assert longest == LENGTH
        assert calls.num_replays > longest / 3


def test_replayed_steps_use_adapters(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(policy, config).double()
    expected, _ = sample(adapted, tokenizer, 64)
    actual, calls = sample(adapted, tokenizer, 6, num_late=4)
    assert [one.ids for one in actual] == [other.ids for other in expected]
    assert calls.num_replays > 20


def test_recording_rejects_what_a_capture_rejects() -> None:
    values = torch.arange(3.0)
    for waits in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: values + torch.tensor([1.0, 2.0, 3.0]),
        lambda: bool(values[0] > 1),
    ):
        with pytest.raises(RuntimeError, match="waits for the device"), Recording():
            waits()


class Devices(TorchDispatchMode):
    """Collects the devices of all tensors that operators read or make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        self.seen |= {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("filters", [(1.0, None), (0.9, 40)])
def test_step_touches_no_memory_of_the_host(
    tokenizer: PreTrainedTokenizerFast, filters: tuple[float, int | None]
) -> None:
    # Tensors of the device `meta` have no memory: reading a value raises, and a tensor of the host would be seen.
    prompts, group, device = [5, 3], 2, torch.device("meta")
    with device, torch.no_grad():
        halves = decoder_and_head(tiny_llama(tokenizer).bfloat16())
    with torch.no_grad():
        cache = StaticCache(prompts, group, 200, device)
        ids = torch.zeros(1, sum(prompts), dtype=torch.long, device=device)
        run_decoder(halves[0], ids, cache.prompts.position_ids, cache)
        uniforms = torch.zeros(len(prompts) * group, 200, device=device)
        last = torch.zeros(cache.max_rows, dtype=torch.long, device=device)
        step = DecodeStep(halves, cache, lambda *drawn: draw(*drawn, 0.8, *filters), uniforms, last, EagerCalls())
        step()
        with Devices() as devices:
            step()
    assert devices.seen == {"meta"}


class CountedGraph:
    """Stands in for a CUDA graph, which no CPU has."""

    num_replays = 0

    def replay(self) -> None:
        CountedGraph.num_replays += 1


def graphs_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capture: Callable[..., Any]) -> CudaGraphs:
    monkeypatch.setattr(CountedGraph, "num_replays", 0)
    for name, value in (("CUDAGraph", CountedGraph), ("graph", capture), ("graph_pool_handle", lambda: (0, 0))):
        monkeypatch.setattr(torch.cuda, name, value)
    return CudaGraphs()


def test_cuda_graphs_run_then_capture_then_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_without_a_gpu(monkeypatch, lambda *_, **__: nullcontext())
    ran: list[int] = []
    for times in range(1, 5):
        graphs("key", lambda: ran.append(0))
        assert (len(ran), CountedGraph.num_replays) == (min(times, 2), max(0, times - 1))
    for key in range(MAX_GRAPHS - 1):
        graphs(key, lambda: None)
    graphs("key", lambda: ran.append(0))  # still kept, and now the last used
    assert len(ran) == 2
    for key in range(MAX_GRAPHS, 2 * MAX_GRAPHS):
        graphs(key, lambda: None)
    graphs("key", lambda: ran.append(0))
    assert len(ran) == 3


def test_cuda_graphs_run_the_step_where_a_capture_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def fail(*_: object, **__: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = graphs_without_a_gpu(monkeypatch, fail)
    results = [graphs(key, lambda: "drawn") for key in (1, 1, 1, 2, 2)]
    assert results == ["drawn"] * 5 and CountedGraph.num_replays == 0
    assert caplog.text.count("decoding without CUDA graphs") == 1 and "stream is capturing" in caplog.text


@given(st.integers(1, 10**6))
def test_bucket_adds_at_most_a_quarter(number: int) -> None:
    assert number <= bucket(number) <= 1.25 * number
    assert bucket(number) <= bucket(number + 1) and bucket(bucket(number)) == bucket(number)


def test_shapes_of_steps_are_few(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    keys: list[Hashable] = []

    def record(key: Hashable, function: Any) -> Any:
        keys.append(key)
        return function()

    sampler = Sampler(policy, tokenizer, max_completion_length=LENGTH, temperature=0.9, batch_size=64)
    sampler.make_calls = lambda: record
    prompts = [encode_text(text, tokenizer) for text in TEXTS]
    sampler.sample(prompts, [(5, index) for index in range(len(TEXTS))], 12)
    assert len(keys) > 100 and len(set(keys)) < len(keys) / 4
