"""Where completions end: at the text `<sep>` however it is written, at eos, at the cap."""

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
    """Draws each completion's next id from its script, for certain, and a filler after it.

    A row is known by its uniforms: whatever place it has in the batch, it reads its own script at its own position.
    """

    def __init__(self) -> None:
        self.script_of: dict[float, tuple[list[int], int]] = {}
        self.rows_per_call: list[int] = []

    def expect(self, key: tuple[int, ...], number: int, script: list[int], max_completion_length: int) -> None:
        for place, uniform in enumerate(np.random.default_rng([*key, number]).random(max_completion_length)):
            self.script_of[float(uniform)] = (script, place)

    def __call__(self, logits: Tensor, uniforms: Tensor, *_: object) -> tuple[Tensor, Tensor, None]:
        assert len(logits) == len(uniforms)
        self.rows_per_call.append(len(uniforms))
        scripts = [self.script_of[uniform] for uniform in uniforms.tolist()]
        ids = [script[place] if place < len(script) else FILLER for script, place in scripts]
        return torch.tensor(ids), torch.zeros(len(ids)), None


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> ScriptedDraw:
    scripted = ScriptedDraw()
    monkeypatch.setattr("rekatrain.trainer.rloo.sampler.in_process.draw", scripted)
    return scripted


@pytest.fixture
def follow(model: LlamaForCausalLM, draws: ScriptedDraw) -> Follow:
    """The one completion of a policy that writes a script."""

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
    """A tokenizer that writes the ends of `<sep>` together with the punctuation around them, as cl100k does."""
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


def test_the_merging_tokenizer_merges(merging_tokenizer: PreTrainedTokenizerFast) -> None:
    assert {".<", "}<", "Ġ<", ">.", ">)"} <= merging_tokenizer.get_vocab().keys()


@pytest.mark.parametrize(
    "text", ["<sep>", "4 <sep>", "4.<sep>", "{4}<sep>", "4<sep>", "4 <sep>.", "{4}<sep>)", "é <sep>"]
)
@pytest.mark.parametrize("pieces", ["merged", "bytes"])
def test_a_completion_ends_with_the_token_that_completes_the_stop(
    follow: Follow, merging_tokenizer: PreTrainedTokenizerFast, text: str, pieces: str
) -> None:
    script = encode_text(text, merging_tokenizer)
    if pieces == "bytes":
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        script = merging_tokenizer.convert_tokens_to_ids(list(letters.pre_tokenize_str(text)[0][0]))
        script = script[: len((text.partition(STOP)[0] + STOP).encode())]
    # The filler that follows, and a second stop, are not sampled.
    completion = follow(merging_tokenizer, [*script, FILLER, *script])
    assert completion == Completion(ids=script, logprobs=[0.0] * len(script), finish_reason=FinishReason.STOP)


@pytest.mark.parametrize("text", [" <sep>", "4.<sep>", "{4}<sep>", "4<sep>\n\n", "(4)<sep>"])
def test_rekas_tokenizer_is_stopped_however_it_writes_the_stop(
    follow: Follow, cl100k: PreTrainedTokenizerFast, text: str
) -> None:
    script = encode_text(text, cl100k)
    completion = follow(cl100k, [*script, *encode_text(" more", cl100k)])
    assert (completion.ids, completion.finish_reason) == (script, FinishReason.STOP)


def test_eos_ends_a_completion_and_belongs_to_it(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    script = [*encode_text("Blue", tokenizer), tokenizer.eos_token_id]
    completion = follow(tokenizer, [*script, *encode_text(" <sep>", tokenizer)])
    assert completion == Completion(ids=script, logprobs=[0.0] * len(script), finish_reason=FinishReason.EOS)


def test_an_immediate_eos_is_a_completion_of_one_id(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    completion = follow(tokenizer, [tokenizer.eos_token_id])
    assert completion == Completion(ids=[tokenizer.eos_token_id], logprobs=[0.0], finish_reason=FinishReason.EOS)


def test_a_completion_is_cut_off_at_the_cap(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text("Blue, as in the sky <sep>", tokenizer)
    completion = follow(tokenizer, script, max_completion_length=4)
    assert completion == Completion(ids=script[:4], logprobs=[0.0] * 4, finish_reason=FinishReason.LENGTH)


@pytest.mark.parametrize("finish_reason", [FinishReason.STOP, FinishReason.EOS])
def test_an_end_at_the_cap_is_no_cut(
    follow: Follow, tokenizer: PreTrainedTokenizerFast, finish_reason: FinishReason
) -> None:
    script = (
        encode_text("Blue <sep>", tokenizer) if finish_reason == FinishReason.STOP else [7, 8, tokenizer.eos_token_id]
    )
    assert follow(tokenizer, script, len(script)) == Completion(
        ids=script, logprobs=[0.0] * len(script), finish_reason=finish_reason
    )
    assert follow(tokenizer, script, len(script) - 1).finish_reason == FinishReason.LENGTH


def test_a_stop_is_not_searched_in_the_prompt(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, draws: ScriptedDraw
) -> None:
    *opening, closing = encode_text("4 <sep>", tokenizer)
    draws.expect((0,), 0, [closing], 3)
    sampler = Sampler(model, tokenizer, max_completion_length=3, temperature=1.0, batch_size=8)
    [[completion]] = sampler.sample([opening], [(0,)], 1)
    assert (completion.ids, completion.finish_reason) == ([closing, FILLER, FILLER], FinishReason.LENGTH)


def test_rows_that_end_leave_the_batch(
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
    assert draws.rows_per_call == num_live
    # One prefill of each prompt, then each token but the last of the rows still going.
    assert num_embedded == [sum(map(len, prompts)), *num_live[1:]]


# The reasoning budget


CLOSING = "\n</reasoning>\n\n"


def test_an_open_reasoning_is_closed_at_the_budget(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    closing = encode_text(CLOSING, tokenizer)
    thought = encode_text(" <reasoning>\nTwo and two make", tokenizer)
    script = [*thought, *[FILLER] * len(closing), *encode_text("4 <sep>", tokenizer)]
    completion = follow(tokenizer, script, 60, reasoning_budget=len(thought))
    # What would have been drawn in place of the closing is lost; the policy goes on behind it.
    assert completion.ids == [*thought, *closing, *encode_text("4 <sep>", tokenizer)]
    assert completion.forced == range(len(thought), len(thought) + len(closing))
    assert completion.finish_reason == FinishReason.STOP
    assert [completion.logprobs[place] for place in completion.forced] == [0.0] * len(closing)
    parsed = parse_completion(tokenizer.decode(completion.ids))
    assert (parsed.reasoning, parsed.answer) == ("Two and two make", "4")


@pytest.mark.parametrize(
    "text",
    [
        " <reasoning>\nTwo.\n</reasoning>\n\n4 and more, more, more <sep>",  # closed before
        " The answer is as I think 4, or is it more <sep>",  # never opened
    ],
)
def test_what_is_closed_or_never_opened_is_left_alone(
    follow: Follow, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    script = encode_text(text, tokenizer)
    budget = len(encode_text(text.split(" more")[0], tokenizer))
    completion = follow(tokenizer, script, 90, reasoning_budget=budget)
    assert (completion.ids, completion.forced, completion.finish_reason) == (script, range(0), FinishReason.STOP)


def test_without_a_budget_a_reasoning_goes_on(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text(" <reasoning>\nTwo and two make four and so on", tokenizer)
    completion = follow(tokenizer, script, len(script))
    assert (completion.ids, completion.forced, completion.finish_reason) == (script, range(0), FinishReason.LENGTH)


def test_an_end_at_the_budget_is_the_end(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    for script in (encode_text(" <reasoning> <sep>", tokenizer), [*encode_text(" <reasoning>", tokenizer), 0]):
        assert script[-1] == 0 == tokenizer.eos_token_id or STOP in tokenizer.decode(script)
        completion = follow(tokenizer, script, 40, reasoning_budget=len(script))
        assert (completion.ids, completion.forced) == (script, range(0))
        assert completion.finish_reason != FinishReason.LENGTH


def test_a_closing_is_cut_off_at_the_cap(follow: Follow, tokenizer: PreTrainedTokenizerFast) -> None:
    thought = encode_text(" <reasoning>\nTwo", tokenizer)
    closing = encode_text(CLOSING, tokenizer)
    completion = follow(tokenizer, thought, len(thought) + 2, reasoning_budget=len(thought))
    assert completion.ids == [*thought, *closing[:2]]
    assert completion.forced == range(len(thought), len(thought) + 2)
    assert completion.finish_reason == FinishReason.LENGTH


def test_forced_tokens_have_no_floor(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cutoff of a forced token must not keep it out of its own distribution when it is scored.
    thought = encode_text(" <reasoning>\nTwo", tokenizer)
    drawn = iter([*thought, *[FILLER] * 40])
    monkeypatch.setattr(
        "rekatrain.trainer.rloo.sampler.in_process.draw",
        lambda *_: (torch.tensor([next(drawn)]), torch.tensor([-0.5]), torch.tensor([-3.0])),
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
    for place in range(cap):
        expected = (0.0, -math.inf) if place in completion.forced else (-0.5, -3.0)
        assert (completion.logprobs[place], completion.cutoffs[place]) == expected
