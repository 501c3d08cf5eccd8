"""Tokenizer loading: a tokenizer that gives wrong ids is rejected before it ruins a run."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import CL100K_GOLDEN_IDS, check_tokenizer, is_cl100k, load_tokenizer

REKA_TEXT = "human: Hi <sep> assistant: <reasoning>\nOkay\n</reasoning>\n\n42 <sep>"
REKA_IDS = [
    *(26380, 25, 21694, 366, 29136, 29, 18328, 25, 366, 20489, 287, 397, 33413, 198),
    *(524, 20489, 287, 1363, 2983, 366, 29136, 29),
]


def write_folder(folder: Path, tokenizer_file: Path, **config: object) -> str:
    folder.mkdir()
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def gpt2_folder(cl100k_file: Path, tmp_path: Path) -> str:
    """A folder as Reka's most likely is: cl100k_base's tokenizer.json, and a config that names GPT-2's class."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return write_folder(tmp_path / "reka", cl100k_file, tokenizer_class="GPT2Tokenizer", **special)


def with_other_split(tokenizer_file: Path, pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def test_golden_ids_are_those_of_cl100k(cl100k: PreTrainedTokenizerFast) -> None:
    assert CL100K_GOLDEN_IDS[REKA_TEXT] == REKA_IDS
    for text, ids in CL100K_GOLDEN_IDS.items():
        assert encode_text(text, cl100k) == ids


def test_load_tokenizer_ignores_a_config_that_names_gpt2(gpt2_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(gpt2_folder)
    assert encode_text(REKA_TEXT, tokenizer) == REKA_IDS
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (100277, 100257, None)
    assert "tokenizer: cl100k_base, golden ids equal" in caplog.messages


def test_check_tokenizer_rejects_what_auto_tokenizer_loads(gpt2_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    if encode_text(REKA_TEXT, tokenizer) == REKA_IDS:
        pytest.skip("this transformers keeps the pre-tokenizer of tokenizer.json")
    with pytest.raises(InputError, match="its tokenizer.json lacks cl100k_base's pre-tokenizer regex"):
        check_tokenizer(tokenizer)


def test_check_tokenizer_rejects_the_split_of_gpt2(cl100k_file: Path) -> None:
    tokenizer = with_other_split(cl100k_file, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    with pytest.raises(InputError, match=r"as \[26380, 25, .*, 287, 29, 198, 33413, .*\], not \[26380, "):
        check_tokenizer(tokenizer)


def test_check_tokenizer_rejects_long_runs_of_digits(cl100k_file: Path) -> None:
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    digits_together = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = with_other_split(cl100k_file, digits_together)
    assert encode_text(REKA_TEXT, tokenizer) == REKA_IDS
    with pytest.raises(InputError, match=r"encodes '1234567' as .*, not \[4513, 10961, 22\]"):
        check_tokenizer(tokenizer)


def test_check_tokenizer_rejects_special_ids_shifted_by_one(cl100k_file: Path, tmp_path: Path) -> None:
    content = json.loads(cl100k_file.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] != 100256]
    content["added_tokens"] = [{**token, "id": token["id"] - 1} for token in kept]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")
    assert is_cl100k(tokenizer)
    with pytest.raises(InputError, match="^the tokenizer is cl100k_base but its eos id is 100256, not 100257$"):
        check_tokenizer(tokenizer)


def test_check_tokenizer_rejects_another_eos_of_cl100k(cl100k_file: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(cl100k_file), eos_token="<|endofprompt|>")
    with pytest.raises(InputError, match="^the tokenizer is cl100k_base but its eos id is 100276, not 100257$"):
        check_tokenizer(tokenizer)


def test_load_tokenizer_rejects_a_missing_eos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="eos token None has id None, outside its 300 ids: set eos_token in"):
        load_tokenizer(write_folder(tmp_path / "model", tmp_path / "tokenizer.json"))


def test_check_tokenizer_rejects_an_eos_outside_the_vocabulary(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    monkeypatch.setattr(type(other), "eos_token_id", 300, raising=False)
    with pytest.raises(InputError, match=r"eos token '<\|endoftext\|>' has id 300, outside its 300 ids"):
        check_tokenizer(other)


def test_load_tokenizer_accepts_another_family(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loaded = load_tokenizer(str(model_folder))
    assert encode_text(REKA_TEXT, loaded) == encode_text(REKA_TEXT, tokenizer)
    assert not is_cl100k(loaded)
    assert caplog.messages == []
    (tmp_path / "reka-flash-3").symlink_to(model_folder)
    load_tokenizer(str(tmp_path / "reka-flash-3"))
    (message,) = caplog.messages
    assert message.endswith("reka-flash-3: 300 ids, not Reka's cl100k_base, so its ids are not checked")


def check_one_line_error(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(f"no tokenizer could be loaded from {str(folder)!r}: ")
    assert "\n" not in str(caught.value)


def test_load_tokenizer_reports_a_missing_one_in_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        check_one_line_error(folder)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param('{"version": "1.0", "added_tok', id="truncated"),
        pytest.param("version https://git-lfs.github.com/spec/v1\nsize 3132712\n", id="git-lfs pointer"),
        pytest.param('{"version": "1.0", "added_tokens": [], "model": {"type": "New"}}', id="of a newer tokenizers"),
    ],
)
def test_load_tokenizer_reports_a_damaged_file_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    check_one_line_error(tmp_path)
