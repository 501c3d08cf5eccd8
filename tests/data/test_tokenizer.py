"""Tokenizer loading: wrong ids are refused before they ruin a run, whoever's files they come from."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import CL100K_GOLDEN_IDS, check_tokenizer, is_cl100k, load_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import SHARED

REKA_TEXT = "human: Hi <sep> assistant: <reasoning>\nOkay\n</reasoning>\n\n42 <sep>"
REKA_IDS = [
    *(26380, 25, 21694, 366, 29136, 29, 18328, 25, 366, 20489, 287, 397, 33413, 198),
    *(524, 20489, 287, 1363, 2983, 366, 29136, 29),
]


def cl100k_file() -> Path:
    path = SHARED / "data" / "cl100k" / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path


def write_folder(folder: Path, tokenizer_file: Path, **config: object) -> str:
    folder.mkdir()
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def gpt2_folder(tmp_path: Path) -> str:
    """A folder as Reka's most likely is: cl100k_base's tokenizer.json, and a config that names GPT-2's class."""
    end = "<|endoftext|>"
    return write_folder(
        tmp_path / "reka",
        cl100k_file(),
        tokenizer_class="GPT2Tokenizer",
        bos_token=end,
        eos_token=end,
        unk_token=end,
    )


def edited_cl100k(tmp_path: Path, edit: dict[str, object]) -> PreTrainedTokenizerFast:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(cl100k_file().read_text(encoding="utf-8")), **edit}))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")


def with_other_split(tokenizer_file: Path, pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def test_the_golden_ids_are_those_of_the_reference(cl100k):
    assert CL100K_GOLDEN_IDS[REKA_TEXT] == REKA_IDS
    for text, ids in CL100K_GOLDEN_IDS.items():
        assert encode_text(text, cl100k) == ids


def test_cl100k_whose_config_names_gpt2_is_loaded_right(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(gpt2_folder(tmp_path))
    assert encode_text(REKA_TEXT, tokenizer) == REKA_IDS
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (100277, 100257, None)
    assert "tokenizer: cl100k_base, golden ids equal" in caplog.messages


def test_what_auto_tokenizer_makes_of_it_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder(tmp_path))
    if encode_text(REKA_TEXT, tokenizer) == REKA_IDS:
        pytest.skip("this transformers keeps the pre-tokenizer of tokenizer.json")
    with pytest.raises(InputError, match="its tokenizer.json lacks cl100k_base's pre-tokenizer regex"):
        check_tokenizer(tokenizer)


def test_cl100k_split_as_gpt2_splits_is_refused():
    tokenizer = with_other_split(cl100k_file(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    with pytest.raises(InputError, match=r"as \[26380, 25, .*, 287, 29, 198, 33413, .*\], not \[26380, "):
        check_tokenizer(tokenizer)


def test_cl100k_with_long_runs_of_digits_is_refused():
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    digits_together = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = with_other_split(cl100k_file(), digits_together)
    assert encode_text(REKA_TEXT, tokenizer) == REKA_IDS
    with pytest.raises(InputError, match=r"encodes '1234567' as .*, not \[4513, 10961, 22\]"):
        check_tokenizer(tokenizer)


def test_special_ids_shifted_by_one_are_refused(tmp_path):
    added = json.loads(cl100k_file().read_text(encoding="utf-8"))["added_tokens"]
    kept = [token for token in added if token["id"] != 100256]
    shifted = [{**token, "id": token["id"] - 1} for token in kept]
    tokenizer = edited_cl100k(tmp_path, {"added_tokens": shifted})
    assert is_cl100k(tokenizer)
    with pytest.raises(InputError, match="^the tokenizer is cl100k_base but its eos id is 100256, not 100257$"):
        check_tokenizer(tokenizer)


def test_another_eos_of_cl100k_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(cl100k_file()), eos_token="<|endofprompt|>")
    with pytest.raises(InputError, match="^the tokenizer is cl100k_base but its eos id is 100276, not 100257$"):
        check_tokenizer(tokenizer)


def test_no_eos_is_refused(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="eos token None has id None, outside its 300 ids: set eos_token in"):
        load_tokenizer(write_folder(tmp_path / "model", tmp_path / "tokenizer.json"))


def test_an_eos_outside_the_vocabulary_is_refused(tokenizer, monkeypatch):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    monkeypatch.setattr(type(other), "eos_token_id", 300, raising=False)
    with pytest.raises(InputError, match=r"eos token '<\|endoftext\|>' has id 300, outside its 300 ids"):
        check_tokenizer(other)


def test_another_family_is_accepted_and_logged(model_folder, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    loaded = load_tokenizer(str(model_folder))
    assert encode_text(REKA_TEXT, loaded) == encode_text(REKA_TEXT, tokenizer)
    assert not is_cl100k(loaded)
    assert "tokenizer: 300 ids, not cl100k_base, so Reka's golden ids do not apply" in caplog.messages


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as caught:
            load_tokenizer(str(folder))
        assert str(caught.value).startswith(f"no tokenizer could be loaded from {str(folder)!r}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param('{"version": "1.0", "added_tok', id="cut off"),
        pytest.param("version https://git-lfs.github.com/spec/v1\nsize 3132712\n", id="git-lfs pointer"),
        pytest.param('{"version": "1.0", "added_tokens": [], "model": {"type": "New"}}', id="of a newer tokenizers"),
    ],
)
def test_a_damaged_tokenizer_file_is_one_line(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"no tokenizer could be loaded from {str(tmp_path)!r}: ")
    assert "\n" not in str(caught.value)
