"""The reward `reward_model`: scores of encoders and decoders, their scale, and what it rejects."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import RewardModelInput, encode_reward_model_input
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.models.classifier import CARD_FILE, classify, set_pad
from rekatrain.rewards.models.ensemble import combine_members
from rekatrain.rewards.models.local import RewardModel
from tests.helpers.reward_models import rewards_of, save_decoder, save_encoder

PROMPT = "human: What is 2+2? <sep> assistant:"


@pytest.fixture(scope="module")
def encoder_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with two labels; read only."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def decoder_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one output; read only."""
    folder = tmp_path_factory.mktemp("decoder")
    save_decoder(folder, tokenizer)
    return folder


def with_scale(folder: Path, to: Path, **card: object) -> Path:
    """Copy a reward model's folder with another card; return the copy."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    whole = {"template": "reka", "reasoning": False, "mean": 0.0, "std": 1.0, "measured_on": "nothing"} | card
    (to / CARD_FILE).write_text(json.dumps(whole))
    return to


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("template", ["reka", "pair", "answer"])
def test_classify_does_not_depend_on_the_micro_batch(kind: str, template: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    set_pad(model, tokenizer)
    prompt = [{"role": "user", "content": "What is 2+2?"}]
    answers = [
        encode_reward_model_input(
            RewardModelInput(prompt=prompt, answer="four " * n), tokenizer, template, max_length=128
        )
        for n in (3, 1, 9, 2, 1, 7)
    ]
    one_by_one = torch.cat([classify(model, [answer], micro_batch_tokens=10_000) for answer in answers])
    assert one_by_one.std(dim=0).min() > 1e-3
    for micro_batch_tokens in (1, 100, 10_000):
        together = classify(model, answers, micro_batch_tokens=micro_batch_tokens)
        assert torch.allclose(together, one_by_one, atol=1e-5)


def test_encode_reward_model_input_marks_an_encoders_two_texts(encoder_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    prompt = [{"role": "user", "content": "Hi"}]
    ids = encode_reward_model_input(
        RewardModelInput(prompt=prompt, answer="[SEP] yes"), tokenizer, "pair", max_length=128
    )
    marks = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [token for token in ids.input_ids if token in marks] == [marks[0], marks[1], marks[1]]
    first = ids.input_ids.index(marks[1]) + 1
    assert ids.token_type_ids == [0] * first + [1] * (len(ids.input_ids) - first)


def test_reward_model_uses_the_folders_scale_or_its_options(decoder_folder: Path, tmp_path: Path) -> None:
    texts = (" four <sep>", " <reasoning>\nTwo.\n</reasoning>\n\nfour <sep>", " five", "")
    raw = rewards_of(decoder_folder, *texts)
    assert raw[0] == pytest.approx(raw[1], abs=1e-5) and abs(raw[1] - raw[2]) > 1e-3  # the reasoning is not scored
    scaled = rewards_of(with_scale(decoder_folder, tmp_path / "scaled", mean=0.5, std=2.0), *texts)
    assert scaled == pytest.approx([(value - 0.5) / 2 for value in raw], abs=1e-5)
    overridden = rewards_of(tmp_path / "scaled", *texts, mean=1.0, std=4.0)
    assert overridden == pytest.approx([(value - 1) / 4 for value in raw], abs=1e-5)
    thoughtful = rewards_of(with_scale(decoder_folder, tmp_path / "thoughtful", reasoning=True), *texts)
    assert thoughtful[0] == pytest.approx(raw[0], abs=1e-5) and abs(thoughtful[1] - raw[1]) > 1e-3


def test_reward_model_needs_a_label_if_there_are_several(encoder_folder: Path, decoder_folder: Path) -> None:
    polite, rude = (
        rewards_of(encoder_folder, " four <sep>", template="pair", label=name)[0] for name in ("polite", "rude")
    )
    assert polite + rude == pytest.approx(1) and 0 < polite < 1
    with pytest.raises(InputError, match="labels rude, polite: name the one"):
        rewards_of(encoder_folder, "")
    with pytest.raises(InputError, match="label 'kind' is not one of them"):
        rewards_of(encoder_folder, "", label="kind")
    with pytest.raises(InputError, match="not one of them"):
        rewards_of(decoder_folder, "", label="polite")


def test_reward_model_counts_cut_texts_and_reports_nan_as_error(decoder_folder: Path, tmp_path) -> None:
    reward = RewardModel(pretrained_model_name_or_path=str(decoder_folder))
    reward.setup()
    prompts = ["human: Hi <sep> assistant:"] * 2
    short, long = reward(prompts=prompts, completions=[" four", " four" * 200])
    assert isinstance(short, float) and isinstance(long, float)
    assert [reward.metrics(), reward.metrics()] == [{"num_cut": 1.0}, {"num_cut": 0.0}]
    answers = RewardModel(pretrained_model_name_or_path=str(decoder_folder), template="answer")
    answers.setup()
    for completions in (["", " four"], ["", ""]):
        values = answers(prompts=prompts, completions=completions)
        assert [isinstance(value, RewardError) for value in values] == [text == "" for text in completions]
    reward._model.score.weight.data.fill_(math.nan)
    assert all(isinstance(value, RewardError) for value in reward(prompts=prompts, completions=["a", "b"]))


def test_reward_model_rejects_other_folders_and_options(
    model_folder: Path, decoder_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not a sequence classifier: it has no weights for score.weight"):
        rewards_of(model_folder, "")
    with pytest.raises(InputError, match="no chat template"):
        rewards_of(decoder_folder, "", template="chat_template")
    for kind, file in (("adapter", "adapter_config.json"), ("run", "recipe.yaml")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / file).write_text("{}")
    broken = with_scale(decoder_folder, tmp_path / "broken", mood="good")
    with pytest.raises(InputError, match="reward_model.json cannot be read"):
        rewards_of(broken, "")
    for options, message in [
        ({"template": "chatml"}, "template is 'chatml'; it should be 'reka', 'chat_template', 'pair' or 'answer'"),
        ({"mean": 1.0}, "go together"),
        ({"mean": 0.0, "std": 0.0}, "std is 0.0; it should be greater than 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0; it should be greater than or equal to 1"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no reward model at './nowhere'"),
        ({"pretrained_model_name_or_path": str(tmp_path / "adapter")}, "adapter' is an adapter, without its base"),
        ({"pretrained_model_name_or_path": str(tmp_path / "run")}, "run' is a run, and the reward needs a whole"),
        ({"pretrained_model_name_or_path": [str(decoder_folder), str(tmp_path / "run")]}, "run' is a run, and the"),
    ]:
        with pytest.raises(InputError, match=message):
            build_reward_functions({"reward_model": {"pretrained_model_name_or_path": str(decoder_folder)} | options})
    with pytest.raises(InputError, match="device is 'cuda:99', but this process sees"):
        rewards_of(decoder_folder, "", device="cuda:99")


@pytest.mark.parametrize(("ensemble", "combine"), [("mean", lambda a, b: (a + b) / 2), ("minimum", min)])
def test_reward_model_ensemble_combines_scaled_scores(decoder_folder: Path, tmp_path: Path, ensemble, combine) -> None:
    texts = (" four <sep>", " five <sep>", " blue")
    one = rewards_of(decoder_folder, *texts)
    other = with_scale(decoder_folder, tmp_path / "other", mean=0.3, std=0.5, reasoning=False)
    two = rewards_of(other, *texts)
    options = {"pretrained_model_name_or_path": [str(decoder_folder), str(other)], "ensemble": ensemble}
    with Grader(build_reward_functions({"reward_model": options})) as grader:
        scores = grader.score(prompts=[PROMPT] * 3, completions=list(texts), completion_ids=[[]] * 3, columns={})
    expected = [combine(a, b) for a, b in zip(one, two, strict=True)]
    assert scores.by_name["reward_model"] == pytest.approx(expected, abs=1e-5)
    uncertainty = [of_one["reward_model"]["uncertainty"] for of_one in scores.metrics]
    assert uncertainty == pytest.approx([abs(a - b) / 2 for a, b in zip(one, two, strict=True)], abs=1e-5)
    assert scores.notes[0]["reward_model"] == pytest.approx([one[0], two[0]], abs=1e-5)


def test_reward_model_ensemble_is_checked_member_by_member(decoder_folder: Path) -> None:
    for paths, message in ([["./nowhere", str(decoder_folder)], "no reward model at './nowhere'"], [[], "at least 2"]):
        with pytest.raises(InputError, match=message):
            build_reward_functions({"reward_model": {"pretrained_model_name_or_path": paths}})
    values = combine_members([[1.0, RewardError("no score")], [2.0, 3.0]], "minimum")
    assert values[0].value == 1.0 and isinstance(values[1], RewardError)
