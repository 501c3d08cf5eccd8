"""Load tokenizers, and check their ids against golden ids.

Where the files of a cl100k_base tokenizer name the class `GPT2Tokenizer`, transformers 5 uses GPT-2's pre-tokenizer:
other ids, no error, and a ruined run (huggingface/transformers#44254, #45812). So the fast tokenizer is loaded from its
`tokenizer.json` alone, and a tokenizer with cl100k_base's vocabulary must give cl100k_base's ids.
"""

import json
import logging
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rekatrain.data.chat import END_OF_TEXT, encode_text
from rekatrain.data.errors import InputError
from rekatrain.data.families import adapt_backend, check_texts

logger = logging.getLogger(__name__)

# Ids of OpenAI's tiktoken for cl100k_base. GPT-2's pre-tokenizer gives other ids for the first text, a pre-tokenizer
# that does not split digits into threes for the second, and one that parses typed special tokens for the third.
CL100K_GOLDEN_IDS: dict[str, list[int]] = {
    "human: Hi <sep> assistant: <reasoning>\nOkay\n</reasoning>\n\n42 <sep>": [
        *(26380, 25, 21694, 366, 29136, 29, 18328, 25, 366, 20489, 287, 397, 33413, 198),
        *(524, 20489, 287, 1363, 2983, 366, 29136, 29),
    ],
    "1234567": [4513, 10961, 22],
    END_OF_TEXT: [27, 91, 8862, 728, 428, 91, 29],
}
CL100K_EOS_ID = 100257
# Far apart in the ranks: a vocabulary with all three is cl100k_base or derived from it.
CL100K_MARKS = {"assistant": 78191, "Ġassistant": 18328, "Ġreasoning": 33811}


def load_tokenizer(pretrained_model_name_or_path: str, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load and check the fast tokenizer of a folder or of a model on the hub.

    Raises InputError where there is none, where it has no usable eos token, where its ids do not give back their text
    (families.py), or where a cl100k_base tokenizer does not give the golden ids. A tokenizer of another family is
    accepted, with a warning if the model is called Reka.
    """
    tokenizer = _load(pretrained_model_name_or_path, revision)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if adapt_backend(backend):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
        logger.info("tokenizer of %s: it adds no space before a text here", pretrained_model_name_or_path)
    check_tokenizer(tokenizer)
    check_texts(tokenizer)
    if "reka" in Path(pretrained_model_name_or_path).name.lower() and not is_cl100k(tokenizer):
        logger.warning(
            "tokenizer of %s: %d ids, not Reka's cl100k_base, so its ids are not checked",
            pretrained_model_name_or_path,
            len(tokenizer),
        )
    return tokenizer


def load_classifier_tokenizer(
    pretrained_model_name_or_path: str, *, revision: str | None = None
) -> PreTrainedTokenizerFast:
    """Load and check a classifier's tokenizer; an encoder's (`[CLS]`, `[SEP]`) needs no eos token."""
    tokenizer = _load(pretrained_model_name_or_path, revision)
    if not is_encoder(tokenizer) or tokenizer.eos_token is not None:
        check_tokenizer(tokenizer)
    return tokenizer


def is_encoder(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True for the tokenizer of an encoder, whose input starts with `[CLS]`, where its score is read."""
    return tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError unless the eos token is usable and a cl100k_base tokenizer gives the golden ids."""
    eos_id = tokenizer.eos_token_id
    if eos_id is None or not 0 <= eos_id < len(tokenizer):
        raise InputError(
            f"the tokenizer's eos token {tokenizer.eos_token!r} has id {eos_id}, outside its {len(tokenizer)} ids: "
            "set eos_token in tokenizer_config.json"
        )
    if not is_cl100k(tokenizer):
        return
    if eos_id != CL100K_EOS_ID:
        raise InputError(f"the tokenizer is cl100k_base but its eos id is {eos_id}, not {CL100K_EOS_ID}")
    for text, golden_ids in CL100K_GOLDEN_IDS.items():
        ids = encode_text(text, tokenizer)
        if ids != golden_ids:
            raise InputError(
                f"the tokenizer has cl100k_base's vocabulary but encodes {text!r} as {ids}, not {golden_ids}: "
                "its tokenizer.json lacks cl100k_base's pre-tokenizer regex; use the file of the published model"
            )
    logger.info("tokenizer: cl100k_base, golden ids equal")


def is_cl100k(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the vocabulary is cl100k_base's, whatever the pre-tokenizer."""
    return all(tokenizer.convert_tokens_to_ids(token) == token_id for token, token_id in CL100K_MARKS.items())


def _load(pretrained_model_name_or_path: str, revision: str | None) -> PreTrainedTokenizerFast:
    try:
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, revision=revision or "main")
    # tokenizers raises the bare class for a tokenizer.json that it cannot read.
    except Exception as error:
        raise InputError(
            f"no tokenizer could be loaded from {pretrained_model_name_or_path!r}: {str(error).splitlines()[0]}"
        ) from error
