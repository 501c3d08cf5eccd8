"""Completions end at the text `<sep>` whatever its tokens are, at eos, or at the length limit."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import STOP, FinishReason, encode_text, parse_completion
from rekatrain.trainer.rloo.sampler.in_process import Completion, Sampler

FILLER = 5
PROMPT = [40, 41, 42]
Follow = Callable[..., Completion]


class ScriptedDraw:
    """Draws the next id of each completion from its script, and a filler after the script.

    The uniform number identifies the completion and the position, so the index in the batch does not matter.
    """

    def __init__(self) -> None:
        self.script_of: dict[float, tuple[list[int], int]] = {}
        self.num_drawn: list[int] = []

    def expect(self, key: tuple[int, ...], number: int, script: list[int], max_completion_length: int) -> None:
        for position, uniform in enumerate(np.random.default_rng([*key, number]).random(max_completion_length)):
            self.script_of[float(uniform)] = (script, position)

    def __call__(self, logits: Tensor, uniforms: Tensor, **_: object) -> tuple[Tensor, Tensor, None]:
        assert len(logits) == len(uniforms)
        self.num_drawn.append(len(uniforms))
        scripts = [self.script_of[uniform] for uniform in uniforms.tolist()]
        ids = [script[position] if position < len(script) else FILLER for script, position in scripts]
        return torch.tensor(ids), torch.zeros(len(ids)), None


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> ScriptedDraw:
    scripted = ScriptedDraw()
    monkeypatch.setattr("rekatrain.trainer.rloo.sampler.in_process.draw", scripted)
    return scripted


@pytest.fixture
def follow(model: LlamaForCausalLM, draws: ScriptedDraw) -> Follow:
    """Sample the one completion of a policy that writes a script."""

    def follow(
        tokenizer: PreTrainedTokenizerFast, script: list[int], max_completion_length: int = 20, **options: int
    ) -> Completion:
        draws.expect((0,), 0, script, max_completion_length)
        sampler = Sampler(
            model,
            tokenizer,
            max_completion_length=max_completion_length,
            temperature=1.0,
            batch_size=8,
            **options,
        )
        model.resize_token_embeddings(len(tokenizer))
        return sampler.sample([PROMPT], [(0,)], 1)[0][0]

    return follow


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that merges the ends of `<sep>` with the punctuation around them, as cl100k does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["four.<sep>.", "{4}<sep>\n\n", "four <sep>)"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_merging_tokenizer_merges_the_ends_of_the_stop(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    assert {".<", "}<", "Ġ<", ">.", ">)"} <= merging_tokenizer.get_vocab().keys()


@pytest.mark.parametrize(
    "text", ["<sep>", "4 <sep>", "4.<sep>", "{4}<sep>", "4<sep>", "4 <sep>.", "{4}<sep>)", "é <sep>"]
)
@pytest.mark.parametrize("tokens", ["merged", "bytes"])
def test_completion_ends_with_the_token_that_completes_the_stop(
    follow: Follow, merging_tokenizer: PreTrainedTokenizerFast, text: str, tokens: str
) -> None:
    script = encode_text(text, merging_tokenizer)
    if tokens == "bytes":
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        script = merging_tokenizer.convert_tokens_to_ids(list(letters.pre_tokenize_str(text)[0][0]))
        script = script[: len((text.partition(STOP)[0] + STOP).encode())]
    # The filler that follows, and a second stop, are not sampled.
    completion = follow(merging_tokenizer, [*script, FILLER, *script])
    assert completion == Completion(ids=script, logprobs=[0.0] * len(script), finish_reason=FinishReason.STOP)


@pytest.mark.parametrize("text", [" <sep>", "4.<sep>", "{4}<sep>", "4<sep>\n\n", "(4)<sep>"])
def test_completion_ends_at_the_stop_in_rekas_tokens(
    follow: Follow, cl100k: PreTrainedTokenizerFast, text: str
) -> None:
    script = encode_text(text, cl100k)
    completion = follow(cl100k, [*script, *encode_text(" more", cl100k)])
    assert (completion.ids, completion.finish_reason) == (script, FinishReason.STOP)


def test_completion_ends_with_eos_included(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    script = [*encode_text("Blue", tokenizer), tokenizer.eos_token_id]
    completion = follow(tokenizer, [*script, *encode_text(" <sep>", tokenizer)])
    assert completion == Completion(ids=script, logprobs=[0.0] * len(script), finish_reason=FinishReason.EOS)


def test_completion_of_an_immediate_eos_has_one_id(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    completion = follow(tokenizer, [tokenizer.eos_token_id])
    assert completion == Completion(ids=[tokenizer.eos_token_id], logprobs=[0.0], finish_reason=FinishReason.EOS)


def test_completion_is_truncated_at_the_length_limit(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text("Blue, as in the sky <sep>", tokenizer)
    completion = follow(tokenizer, script, max_completion_length=4)
    assert completion == Completion(ids=script[:4], logprobs=[0.0] * 4, finish_reason=FinishReason.LENGTH)


@pytest.mark.parametrize("finish_reason", [FinishReason.STOP, FinishReason.EOS])
def test_completion_that_ends_at_the_limit_is_not_truncated(
    follow: Follow, tokenizer: PreTrainedTokenizerFast, finish_reason: FinishReason
) -> None:
    script = (
        encode_text("Blue <sep>", tokenizer) if finish_reason == FinishReason.STOP else [7, 8, tokenizer.eos_token_id]
    )
    assert follow(tokenizer, script, len(script)) == Completion(
        ids=script, logprobs=[0.0] * len(script), finish_reason=finish_reason
    )
    assert follow(tokenizer, script, len(script) - 1).finish_reason == FinishReason.LENGTH


def test_stop_is_not_searched_in_the_prompt(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, draws: ScriptedDraw
) -> None:
    *opening, closing = encode_text("4 <sep>", tokenizer)
    draws.expect((0,), 0, [closing], 3)
    sampler = Sampler(model, tokenizer, max_completion_length=3, temperature=1.0, batch_size=8)
    [[completion]] = sampler.sample([opening], [(0,)], 1)
    assert (completion.ids, completion.finish_reason) == ([closing, FILLER, FILLER], FinishReason.LENGTH)


def test_completions_that_end_leave_the_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, draws: ScriptedDraw
) -> None:
    eos = tokenizer.eos_token_id
    stop = encode_text("Blue <sep>", tokenizer)
    prompts = [[50], [51, 52], [53, 54, 55], [56]]
    scripts = [[60, 61, eos], [eos], stop, [62] * 20]
    for prompt_index, script in enumerate(scripts):
        for number in range(2):
            draws.expect((7, prompt_index), number, script, 9)
    num_embedded = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: num_embedded.append(inputs[0].numel()))
    sampler = Sampler(model, tokenizer, max_completion_length=9, temperature=1.0, batch_size=8)
    groups = sampler.sample(prompts, [(7, prompt_index) for prompt_index in range(4)], 2)

    assert [[completion.ids for completion in group] for group in groups] == [
        [[60, 61, eos]] * 2,
        [[eos]] * 2,
        [stop] * 2,
        [[62] * 9] * 2,
    ]
    assert [group[0].finish_reason for group in groups] == [
        FinishReason.EOS,
        FinishReason.EOS,
        FinishReason.STOP,
        FinishReason.LENGTH,
    ]
    ends = [3, 1, len(stop), 9]
    num_live = [sum(2 * (end > length) for end in ends) for length in range(9)]
    assert draws.num_drawn == num_live
    # One prefill of each prompt, then each token but the last of the live completions.
    assert num_embedded == [sum(map(len, prompts)), *num_live[1:]]


# The reasoning budget


CLOSING = "\n</reasoning>\n\n"


def test_reasoning_budget_closes_an_open_reasoning(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    closing = encode_text(CLOSING, tokenizer)
    thought = encode_text(" <reasoning>\nTwo and two make", tokenizer)
    script = [*thought, *[FILLER] * len(closing), *encode_text("4 <sep>", tokenizer)]
    completion = follow(tokenizer, script, 60, reasoning_budget=len(thought))
    # Tokens drawn while the closing is forced are dropped; the policy continues after it.
    assert completion.ids == [*thought, *closing, *encode_text("4 <sep>", tokenizer)]
    assert completion.forced == range(len(thought), len(thought) + len(closing))
    assert completion.finish_reason == FinishReason.STOP
    assert [completion.logprobs[index] for index in completion.forced] == [0.0] * len(closing)
    parsed = parse_completion(tokenizer.decode(completion.ids))
    assert (parsed.reasoning, parsed.answer) == ("Two and two make", "4")


@pytest.mark.parametrize(
    "text",
    [
        " <reasoning>\nTwo.\n</reasoning>\n\n4 and more, more, more <sep>",  # closed before
        " The answer is as I think 4, or is it more <sep>",  # never opened
    ],
)
def test_reasoning_budget_ignores_closed_and_unopened_reasoning(
    follow: Follow, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    script = encode_text(text, tokenizer)
    budget = len(encode_text(text.split(" more")[0], tokenizer))
    completion = follow(tokenizer, script, 90, reasoning_budget=budget)
    assert (completion.ids, completion.forced, completion.finish_reason) == (script, range(0), FinishReason.STOP)


def test_reasoning_without_a_budget_is_not_closed(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text(" <reasoning>\nTwo and two make four and so on", tokenizer)
    completion = follow(tokenizer, script, len(script))
    assert (completion.ids, completion.forced, completion.finish_reason) == (script, range(0), FinishReason.LENGTH)


def test_reasoning_budget_does_not_extend_an_ended_completion(
    follow: Follow, tokenizer: PreTrainedTokenizerFast
) -> None:
    for script in (encode_text(" <reasoning> <sep>", tokenizer), [*encode_text(" <reasoning>", tokenizer), 0]):
        assert script[-1] == 0 == tokenizer.eos_token_id or STOP in tokenizer.decode(script)
        completion = follow(tokenizer, script, 40, reasoning_budget=len(script))
        assert (completion.ids, completion.forced) == (script, range(0))
        assert completion.finish_reason != FinishReason.LENGTH


def test_reasoning_closing_is_truncated_at_the_length_limit(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    thought = encode_text(" <reasoning>\nTwo", tokenizer)
    closing = encode_text(CLOSING, tokenizer)
    completion = follow(tokenizer, thought, len(thought) + 2, reasoning_budget=len(thought))
    assert completion.ids == [*thought, *closing[:2]]
    assert completion.forced == range(len(thought), len(thought) + 2)
    assert completion.finish_reason == FinishReason.LENGTH


def test_forced_tokens_have_a_cutoff_of_minus_infinity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A forced token must not be filtered out of the distribution that the trainer scores it with.
    thought = encode_text(" <reasoning>\nTwo", tokenizer)
    drawn = iter([*thought, *[FILLER] * 40])
    monkeypatch.setattr(
        "rekatrain.trainer.rloo.sampler.in_process.draw",
        lambda *_, **__: (torch.tensor([next(drawn)]), torch.tensor([-0.5]), torch.tensor([-3.0])),
    )
    cap = len(thought) + 20
    sampler = Sampler(
        model,
        tokenizer,
        max_completion_length=cap,
        temperature=1.0,
        batch_size=8,
        top_k=5,
        reasoning_budget=len(thought),
    )
    [[completion]] = sampler.sample([PROMPT], [(0,)], 1)
    assert len(completion.forced) == len(encode_text(CLOSING, tokenizer)) < 20
    for index in range(cap):
        expected = (0.0, -math.inf) if index in completion.forced else (-0.5, -3.0)
        assert (completion.logprobs[index], completion.cutoffs[index]) == expected
