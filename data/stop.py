"""Find the stop in sampled ids, and decode them. Sampled ids are cut and decoded, and never tokenized again."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import AFTER_REASONING, END_OF_TEXT, REASONING_CLOSE, REASONING_OPEN, STOP, encode_text


def decode_completion(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of sampled ids; a final eos token becomes `<|endoftext|>`, whatever the tokenizer calls it."""
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(list(ids[:-1] if ended else ids), clean_up_tokenization_spaces=False))
    return text + END_OF_TEXT if ended else text


def reasoning_closing(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that close the reasoning of a completion that begins with `ids`; none where none is open."""
    text = decode_completion(ids, tokenizer)
    is_open = REASONING_OPEN in text and REASONING_CLOSE not in text
    return encode_text(f"\n{REASONING_CLOSE}{AFTER_REASONING}", tokenizer) if is_open else []


class StopSearch:
    """Find the token that completes the text `<sep>` in sampled ids, whichever tokens spell it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._closing_ids = {token_id for token, token_id in tokenizer.get_vocab().items() if STOP[-1] in token}

    def completes_at(self, ids: Sequence[int], end: int) -> bool:
        """Return True if `ids[end - 1]` completes a `<sep>`. Only a set look-up for all but a few tokens."""
        if end == 0 or ids[end - 1] not in self._closing_ids:
            return False
        # A token has at least one character, so the stop has at most as many tokens as characters.
        window = list(ids[max(0, end - len(STOP)) : end])
        return STOP in self._tokenizer.decode(window, clean_up_tokenization_spaces=False)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the ids up to and including the token that completes the first `<sep>`; all ids if there is none."""
        ends = (end for end in range(1, len(ids) + 1) if self.completes_at(ids, end))
        return list(ids[: next(ends, len(ids))])
