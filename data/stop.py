"""Sampled ids: where they stop, and how they read. Ids are the truth: they are cut and decoded, never re-tokenized."""

from collections.abc import Sequence

from rekatrain.data.chat import AFTER_REASONING, END_OF_TEXT, REASONING_CLOSE, REASONING_OPEN, STOP, encode_text
from transformers import PreTrainedTokenizerBase


def decode_completion(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of sampled ids for rewards and people; a final eos token reads `<|endoftext|>` whatever its own name."""
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(list(ids[:-1] if ended else ids), clean_up_tokenization_spaces=False))
    return text + END_OF_TEXT if ended else text


def reasoning_closing(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end the reasoning of a completion which begins with `ids`; none where it is not open there."""
    text = decode_completion(ids, tokenizer)
    is_open = REASONING_OPEN in text and REASONING_CLOSE not in text
    return encode_text(f"\n{REASONING_CLOSE}{AFTER_REASONING}", tokenizer) if is_open else []


class StopSearch:
    """Finds the token that completes the text `<sep>` in sampled ids, whichever tokens it was written with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._closing_ids = {token_id for token, token_id in tokenizer.get_vocab().items() if STOP[-1] in token}

    def completes_at(self, ids: Sequence[int], end: int) -> bool:
        """Say whether the last of the first `end` ids completes a `<sep>`; a look-up for all but a few tokens."""
        if end == 0 or ids[end - 1] not in self._closing_ids:
            return False
        # Every token is at least one character, so the stop lies within as many tokens as it has characters.
        window = list(ids[max(0, end - len(STOP)) : end])
        return STOP in self._tokenizer.decode(window, clean_up_tokenization_spaces=False)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Ids up to and including the token that completes the first `<sep>`; all of them where there is none."""
        ends = (end for end in range(1, len(ids) + 1) if self.completes_at(ids, end))
        return list(ids[: next(ends, len(ids))])
