"""The sampler draws from the policy's distribution exactly, records what it drew with, and stops where it should."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from data.chat import STOP, Ending, encode_text
from trainer.rloo.logprobs import CompletionLogprobs, make_rows
from trainer.rloo.sampler import Completion, Sampler, draw

CPU = torch.device("cpu")


def grid(num_points: int) -> torch.Tensor:
    """The middles of `num_points` equal parts of [0, 1)."""
    return (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_each_token_takes_its_probability_of_the_uniforms(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(60) * 3
    num_points = 20_000
    ids, logprobs = draw(logits.expand(num_points, -1), grid(num_points), temperature)

    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    counts = torch.bincount(ids, minlength=len(logits))
    assert (counts - num_points * probabilities).abs().max() <= 1.01
    torch.testing.assert_close(logprobs.double(), probabilities.log()[ids], rtol=0, atol=1e-5)
    assert torch.equal(ids, ids.sort().values)


def test_each_row_is_drawn_from_its_own_logits() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    ids, logprobs = draw(logits, torch.tensor([0.6, 0.6, 0.4]), 1.0)
    assert ids.tolist() == [1, 0, 0]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.75, 0.5]))


def test_a_token_without_probability_is_never_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 12)
    forbidden = [0, 1, 5, 10, 11]
    logits[:, forbidden] = -math.inf
    edges = [0.0, 2.0**-53, 0.5, 1 - 2.0**-53]  # numpy's uniforms are the multiples of 2^-53 below 1
    for uniform in edges:
        ids, logprobs = draw(logits, torch.full((200,), uniform, dtype=torch.float64), 1.0)
        assert not set(ids.tolist()) & set(forbidden)
        assert logprobs.isfinite().all()


def test_the_tail_of_a_large_vocabulary_can_be_drawn() -> None:
    logits = torch.full((1, 100_000), -10.0)
    logits[0, 0] = 10.0  # the others share 2e-4, each less than float32 can add to 1
    ids, _ = draw(logits.expand(2, -1), torch.tensor([1 - 1e-9, 1 - 1e-4], dtype=torch.float64), 1.0)
    assert ids[0].item() == 99_999
    assert 1 < ids[1].item() < 99_999


def test_temperature_zero_takes_the_most_likely_token_and_its_logprob_at_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9]])
    for uniform in (0.0, 0.999):
        ids, logprobs = draw(logits, torch.full((2,), uniform), 0)
        assert ids.tolist() == [1, 0]
        torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=1)[[0, 1], [1, 0]], rtol=0, atol=0)


TEXTS = ["human: What is 2+2? <sep> assistant:", "human: 17 + 25 = <sep> assistant:", "Be brief.", "a"]
KEYS = [(3, 0, slot) for slot in range(len(TEXTS))]


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [encode_text(text, tokenizer) for text in TEXTS]


@pytest.fixture
def policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The tiny model in float64, so that no draw hangs on rounding, made to end about every tenth token with eos."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.5
    return model.double()


def make_sampler(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    max_completion_length: int = 12,
    temperature: float = 0.8,
    batch_size: int = 64,
) -> Sampler:
    return Sampler(
        model,
        tokenizer,
        max_completion_length=max_completion_length,
        temperature=temperature,
        batch_size=batch_size,
    )


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids for completion in group] for group in groups]


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_recorded_logprobs_equal_scored_logprobs(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], is_lora: bool
) -> None:
    if is_lora:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        policy = get_peft_model(policy, config).double()
    groups = make_sampler(policy, tokenizer, temperature=0.7).sample(prompts, KEYS, 5)
    recorded = [logprob for group in groups for completion in group for logprob in completion.logprobs]
    scored = CompletionLogprobs(policy, temperature=0.7, num_tokens=len(tokenizer))
    logprobs_T = scored(make_rows(prompts, ids_of(groups), CPU))
    torch.testing.assert_close(torch.tensor(recorded), logprobs_T.detach(), rtol=0, atol=1e-5)
    assert len({len(completion.ids) for group in groups for completion in group}) > 2


def test_a_completion_depends_neither_on_its_batch_nor_on_its_neighbours(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    together = make_sampler(policy, tokenizer).sample(prompts, KEYS, 3)
    assert {completion.ending for group in together for completion in group} == {Ending.EOS, Ending.LENGTH}
    assert len({tuple(completion.ids) for group in together for completion in group}) > 6

    for batch_size in (3, 5, 6, 12):
        again = make_sampler(policy, tokenizer, batch_size=batch_size).sample(prompts, KEYS, 3)
        assert ids_of(again) == ids_of(together)
    alone = [
        make_sampler(policy, tokenizer).sample([prompt], [key], 3)[0] for prompt, key in zip(prompts, KEYS, strict=True)
    ]
    assert ids_of(alone) == ids_of(together)
    for one, other in zip(sum(alone, []), sum(together, []), strict=True):
        assert one.ending == other.ending
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    backwards = make_sampler(policy, tokenizer).sample(prompts[::-1], KEYS[::-1], 3)
    assert ids_of(backwards[::-1]) == ids_of(together)


def test_other_keys_draw_other_completions(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    sampler = make_sampler(policy, tokenizer)
    keys = [(3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0)]
    groups = ids_of(sampler.sample([prompts[0]] * 4, keys, 4))
    assert len({tuple(ids) for group in groups for ids in group}) > 12


def test_samples_from_one_prefill_are_those_of_separate_calls(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    # numpy fills a short seed up with zeros, so number 0 of key (7, n) draws with the uniforms of number n of key (7,).
    assert np.random.default_rng([7, 2, 0]).random() == np.random.default_rng([7, 2]).random()
    sampler = make_sampler(policy, tokenizer)
    for prompt in prompts[:2]:
        [group] = sampler.sample([prompt], [(7,)], 6)
        separate = [sampler.sample([prompt], [(7, number)], 1)[0][0] for number in range(6)]
        assert [completion.ids for completion in group] == [completion.ids for completion in separate]
        assert [completion.ending for completion in group] == [completion.ending for completion in separate]


def test_the_first_tokens_of_many_samples_have_the_policys_distribution(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    num_samples = 4000
    sampler = make_sampler(policy, tokenizer, max_completion_length=1, batch_size=num_samples)
    [group] = sampler.sample(prompts[:1], KEYS[:1], num_samples)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in group]), minlength=len(tokenizer))
    logits = policy(torch.tensor(prompts[:1])).logits[0, -1, : len(tokenizer)]
    expected = num_samples * torch.softmax(logits / 0.8, dim=0)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    # Mean 299 and deviation 24 under the null hypothesis; the draws are seeded.
    assert chi_squared < 299 + 4 * 24.5


def test_greedy_equals_generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    model.double()
    groups = make_sampler(model, tokenizer, temperature=0).sample(prompts, KEYS, 1)
    for prompt, [completion] in zip(prompts, groups, strict=True):
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=tokenizer.eos_token_id,
            suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
        )
        assert completion.ids == generated[0, len(prompt) :].tolist()
        logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = torch.log_softmax(logits, dim=1).amax(dim=1).tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


def test_ids_beyond_the_tokenizer_are_never_sampled(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    expected = make_sampler(policy, tokenizer).sample(prompts, KEYS, 4)
    with torch.no_grad():
        policy.lm_head.weight[len(tokenizer) :] = 0.0
        policy.lm_head.weight[len(tokenizer), 1] = 1e6
        policy.lm_head.weight[len(tokenizer) + 1, 1] = -1e6
    assert policy(torch.tensor(prompts[:1])).logits[0, -1].argmax() >= len(tokenizer)
    for temperature in (0.8, 0):
        groups = make_sampler(policy, tokenizer, temperature=temperature).sample(prompts, KEYS, 4)
        assert max(token for group in ids_of(groups) for ids in group for token in ids) < len(tokenizer)
    assert ids_of(make_sampler(policy, tokenizer).sample(prompts, KEYS, 4)) == ids_of(expected)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_leaves_the_model_as_it_was(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    is_training: bool,
    dtype: torch.dtype,
) -> None:
    model.to(dtype).train(is_training)
    before = copy.deepcopy(model.state_dict())
    make_sampler(model, tokenizer).sample(prompts, KEYS, 2)
    assert all(module.training == is_training for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], weight)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_where_sampling_fails(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    with pytest.raises(IndexError):
        make_sampler(model, tokenizer).sample([[10**6]], KEYS[:1], 2)
    assert model.training


def test_a_model_in_training_with_checkpointing_samples_the_same(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]
) -> None:
    expected = make_sampler(policy, tokenizer).sample(prompts, KEYS, 2)
    policy.activation_checkpointing_enable()
    assert ids_of(make_sampler(policy.train(), tokenizer).sample(prompts, KEYS, 2)) == ids_of(expected)


class ScriptedModel(torch.nn.Module):
    """Continues each prompt with the ids of its script, for certain, and with a filler after them.

    What follows is looked up by a token and its position, so that scripts stay apart in any batch.
    """

    def __init__(self, like: LlamaForCausalLM, num_tokens: int, scripts: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.config = like.config
        self.device = CPU
        self.num_tokens = num_tokens
        self.followers: dict[tuple[int, int], int] = {}
        self.rows_per_call: list[int] = []
        for prompt, script in scripts.items():
            ids = [prompt[-1], *script]
            for place, follower in enumerate(script):
                key = (ids[place], len(prompt) - 1 + place)
                assert self.followers.setdefault(key, follower) == follower

    def forward(self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: object) -> CausalLMOutputWithPast:
        self.rows_per_call.append(len(input_ids))
        logits = torch.full((len(input_ids), 1, self.num_tokens), -math.inf)
        for row, key in enumerate(zip(input_ids[:, -1].tolist(), position_ids[:, -1].tolist(), strict=True)):
            logits[row, 0, self.followers.get(key, FILLER)] = 0.0
        return CausalLMOutputWithPast(logits=logits)


FILLER = 5
PROMPT = (40, 41, 42)


def follow(
    like: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, script: list[int], max_completion_length: int = 20
) -> Completion:
    """The one completion of a model that writes `script`."""
    scripted = ScriptedModel(like, len(tokenizer), {PROMPT: script})
    sampler = make_sampler(scripted, tokenizer, max_completion_length, temperature=1.0)
    return sampler.sample([list(PROMPT)], [(0,)], 1)[0][0]


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
    model: LlamaForCausalLM, merging_tokenizer: PreTrainedTokenizerFast, text: str, pieces: str
) -> None:
    script = encode_text(text, merging_tokenizer)
    if pieces == "bytes":
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        script = merging_tokenizer.convert_tokens_to_ids(list(letters.pre_tokenize_str(text)[0][0]))
        script = script[: len((text.partition(STOP)[0] + STOP).encode())]
    # The filler that follows, and a second stop, are not sampled.
    completion = follow(model, merging_tokenizer, [*script, FILLER, *script])
    assert completion == Completion(ids=script, logprobs=[0.0] * len(script), ending=Ending.STOP)


@pytest.mark.parametrize("text", [" <sep>", "4.<sep>", "{4}<sep>", "4<sep>\n\n", "(4)<sep>"])
def test_rekas_tokenizer_is_stopped_however_it_writes_the_stop(
    model: LlamaForCausalLM, cl100k: PreTrainedTokenizerFast, text: str
) -> None:
    script = encode_text(text, cl100k)
    completion = follow(model, cl100k, [*script, *encode_text(" more", cl100k)])
    assert (completion.ids, completion.ending) == (script, Ending.STOP)


def test_eos_ends_a_completion_and_belongs_to_it(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    script = [*encode_text("Blue", tokenizer), tokenizer.eos_token_id]
    completion = follow(model, tokenizer, [*script, *encode_text(" <sep>", tokenizer)])
    assert completion == Completion(ids=script, logprobs=[0.0] * len(script), ending=Ending.EOS)


def test_an_immediate_eos_is_a_completion_of_one_id(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    completion = follow(model, tokenizer, [tokenizer.eos_token_id])
    assert completion == Completion(ids=[tokenizer.eos_token_id], logprobs=[0.0], ending=Ending.EOS)


def test_a_completion_is_cut_off_at_the_cap(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    script = encode_text("Blue, as in the sky <sep>", tokenizer)
    completion = follow(model, tokenizer, script, max_completion_length=4)
    assert completion == Completion(ids=script[:4], logprobs=[0.0] * 4, ending=Ending.LENGTH)


@pytest.mark.parametrize("ending", [Ending.STOP, Ending.EOS])
def test_an_end_at_the_cap_is_no_cut(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ending: Ending
) -> None:
    script = encode_text("Blue <sep>", tokenizer) if ending == Ending.STOP else [7, 8, tokenizer.eos_token_id]
    assert follow(model, tokenizer, script, len(script)) == Completion(
        ids=script, logprobs=[0.0] * len(script), ending=ending
    )
    assert follow(model, tokenizer, script, len(script) - 1).ending == Ending.LENGTH


def test_a_stop_is_not_searched_in_the_prompt(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    *opening, closing = encode_text("4 <sep>", tokenizer)
    scripted = ScriptedModel(model, len(tokenizer), {tuple(opening): [closing]})
    [[completion]] = make_sampler(scripted, tokenizer, 3).sample([opening], [(0,)], 1)
    assert (completion.ids, completion.ending) == ([closing, FILLER, FILLER], Ending.LENGTH)


def test_rows_that_end_leave_the_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    stop = encode_text("Blue <sep>", tokenizer)
    scripts = {(50,): [60, 61, eos], (51, 52): [eos], (53, 54, 55): stop, (56,): [62] * 20}
    scripted = ScriptedModel(model, len(tokenizer), scripts)
    groups = make_sampler(scripted, tokenizer, 9).sample([list(prompt) for prompt in scripts], KEYS, 2)
    assert ids_of(groups) == [[[60, 61, eos]] * 2, [[eos]] * 2, [stop] * 2, [[62] * 9] * 2]
    assert [group[0].ending for group in groups] == [Ending.EOS, Ending.EOS, Ending.STOP, Ending.LENGTH]
    ends = [2 * 3, 2 * 1, 2 * len(stop), 2 * 9]
    # One prefill of the four prompts, then one forward for each token but the last, of the rows still going.
    assert scripted.rows_per_call[0] == 4
    assert scripted.rows_per_call[1:] == [sum(2 * (end // 2 > length) for end in ends) for length in range(1, 9)]
