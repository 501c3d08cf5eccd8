"""Thoughts of a judge: the part of its reply before the verdict."""

import re

from rekatrain.rewards.errors import RewardError

# Tags of reasoning models; a chat template may have opened the block, so that only its end is in the reply.
OPEN = re.compile(r"\s*(?:<(?:think|thinking|reasoning|thought)>|\[THINK\])", re.IGNORECASE)
CLOSE = re.compile(r"</(?:think|thinking|reasoning|thought)>|\[/THINK\]", re.IGNORECASE)
# A flat JSON object at the end of a reply, maybe in a fence.
LAST_OBJECT = re.compile(r"(\{[^{}]*\})\s*(?:```)?\s*\Z")
MAX_OBJECT = 1_000


def without_thoughts(reply: str, *, is_free: bool = False) -> str:
    """Return what follows a tagged block of thoughts; with `is_free`, only the JSON object at the very end.

    >>> without_thoughts('<think>\\nGood, 9?\\n</think>\\n\\n{"score": 8}')
    '{"score": 8}'

    Raises RewardError for a reply that ends within its thoughts.
    """
    ends = list(CLOSE.finditer(reply))
    if not ends and OPEN.match(reply):
        raise RewardError("the judge's reply ends within its thoughts: raise max_tokens")
    text = reply[ends[-1].end() :] if ends else reply
    if not is_free:
        return text.strip()
    last = LAST_OBJECT.search(text[-MAX_OBJECT:])
    if last is None:
        raise RewardError(
            f"the judge's reply does not end in a JSON object: {text[-120:]!r}; if it was cut off, raise max_tokens"
        )
    return last[1]
