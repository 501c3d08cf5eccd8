"""How an answer reads to a reward model: the ids of a prompt and one answer to it, in that model's own template.

The answer may be a policy's, which gains by whatever raises its score. So a special token's name in any text is only
text, and in the Reka format an answer cannot hold `<sep>`: it is cut there (data/chat.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import Message, encode_text, render_completion, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import is_encoder

# `<`, something without a space, `>`; and words in capitals in square brackets, as Mistral's and BERT's tokens.
_MARKUP = re.compile(r"<(?=[^<>\s]{1,64}>)|\[(?=/?g?[A-Z_]{2,}\d*\])")

Template = Literal["reka", "chat_template", "pair", "answer"]
TextTemplate = Literal["reka", "answer"]


@dataclass(frozen=True, kw_only=True)
class RewardModelInput:
    """An answer to be judged, and the conversation that it answers; `reasoning` only where it is to be judged too."""

    prompt: Sequence[Message]
    answer: str
    reasoning: str | None = None


@dataclass(frozen=True, kw_only=True)
class RewardModelIds:
    """Ids for a classifier; `token_type_ids` are 0 for the prompt and 1 for the answer (equal lengths).

    is_cut: whether the beginning was cut off, to keep to the model's context
    """

    input_ids: list[int]
    token_type_ids: list[int]
    is_cut: bool = False


def check_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where the tokenizer cannot render `template`."""
    if template == "chat_template" and not tokenizer.chat_template:
        raise InputError(
            "the folder's tokenizer has no chat template: set template to reka, pair or answer, whichever the model "
            "was trained with"
        )


def render_text(judged: RewardModelInput, template: TextTemplate) -> str:
    """The answer as one text, in a template that needs no tokenizer.

    reka:   `human: {question} <sep> assistant: {answer} <sep>`, with the stop also for an answer that was cut off: a
            model that was trained on finished turns knows no other end
    answer: the answer alone
    """
    if template == "reka":
        return render_prompt(judged.prompt) + render_completion(judged.reasoning, judged.answer)
    return judged.answer if judged.reasoning is None else f"{judged.reasoning}\n\n{judged.answer}"


def encode_reward_model_input(
    judged: RewardModelInput, tokenizer: PreTrainedTokenizerBase, template: Template, *, max_length: int
) -> RewardModelIds:
    """Encode an answer for a classifier with a context of `max_length`, cutting the beginning of what is longer.

    reka:          as `render_text` writes it
    chat_template: by the tokenizer's own chat template
    pair, answer:  the last message of the prompt and the answer, as the two texts of an encoder; the answer alone
    """
    first: list[int] = []
    if template == "reka":
        # Encoded apart, as in a training row: what the policy samples is never merged with its prompt.
        second = encode_text(render_prompt(judged.prompt), tokenizer)
        second += encode_text(render_completion(judged.reasoning, judged.answer), tokenizer)
    elif template == "chat_template":
        # The template writes the special tokens, so they are read as such; the messages cannot hold any.
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in judged.prompt]
        turns.append({"role": "assistant", "content": render_text(judged, "answer")})
        neutral = [{**turn, "content": break_special_tokens(turn["content"], tokenizer)} for turn in turns]
        text = tokenizer.apply_chat_template(neutral, tokenize=False)
        return _framed([], tokenizer(text, add_special_tokens=False)["input_ids"], [], [], max_length)
    else:
        first = encode_text(judged.prompt[-1]["content"], tokenizer) if template == "pair" else []
        second = encode_text(render_text(judged, "answer"), tokenizer)
        if not second:  # no second text, as transformers takes an empty one
            first, second = [], first
    before, after = ([tokenizer.cls_token_id], [tokenizer.sep_token_id]) if is_encoder(tokenizer) else ([], [])
    return _framed(first + after if first else [], second, before, after, max_length)


def break_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a space inside every name of a special token: `< |im_end|>`."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    broken = text
    while held := [name for name in names if name in broken]:
        for name in held:
            broken = broken.replace(name, f"{name[0]} {name[1:]}")
    return broken


def break_markup(text: str) -> str:
    """The text with a space inside whatever may be another program's markup, for a server whose tokenizer is not here.

    Servers read the name of a special token as that token wherever it stands, also in the middle of a message.

    >>> break_markup("<|im_end|> </s> [/INST] a < b")
    '< |im_end|> < /s> [ /INST] a < b'
    """
    return _MARKUP.sub(lambda found: f"{found[0]} ", text)


def _framed(
    first: list[int], second: list[int], before: list[int], after: list[int], max_length: int
) -> RewardModelIds:
    """`before`, what fits of first and second, `after`; of what does not fit the beginning goes."""
    room = max_length - len(before) - len(after)
    surplus = max(0, len(first) + len(second) - room)
    first_kept = first[surplus:]
    second_kept = second[max(0, surplus - len(first)) :]
    return RewardModelIds(
        input_ids=before + first_kept + second_kept + after,
        token_type_ids=[0] * (len(before) + len(first_kept)) + [int(bool(first))] * (len(second_kept) + len(after)),
        is_cut=surplus > 0,
    )
