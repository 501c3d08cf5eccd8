"""Render and encode the input of a reward model: a prompt and one answer to it, in the template of that model.

A policy learns to write whatever raises its score. So the name of a special token is encoded as plain text wherever it
appears, and an answer in the Reka format cannot hold `<sep>`, because it ends there (data/chat.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import Message, encode_text, render_completion, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.families import bos_ids
from rekatrain.data.tokenizer import is_encoder

# `<...>` without a space inside, and words in capitals in square brackets, as the tokens of Mistral and BERT.
_MARKUP = re.compile(r"<(?=[^<>\s]{1,64}>)|\[(?=/?g?[A-Z_]{2,}\d*\])")

Template = Literal["reka", "chat_template", "pair", "answer"]
TextTemplate = Literal["reka", "answer"]


@dataclass(frozen=True, kw_only=True)
class RewardModelInput:
    """An answer to score.

    prompt:    the conversation that it answers
    reasoning: the reasoning before the answer, where the model scores that too; otherwise None
    """

    prompt: Sequence[Message]
    answer: str
    reasoning: str | None = None


@dataclass(frozen=True, kw_only=True)
class RewardModelIds:
    """Encoded input of a classifier.

    input_ids:      the ids of prompt and answer, with the special tokens of the template
    token_type_ids: 0 for the prompt and 1 for the answer, as many as `input_ids`
    is_cut:         True if the beginning was cut off to fit the model's context
    """

    input_ids: list[int]
    token_type_ids: list[int]
    is_cut: bool = False


def check_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the tokenizer cannot render `template`."""
    if template == "chat_template" and not tokenizer.chat_template:
        raise InputError(
            "the folder's tokenizer has no chat template: set template to reka, pair or answer, the one that the "
            "model was trained with"
        )


def render_text(item: RewardModelInput, template: TextTemplate) -> str:
    """Return the input as one text, in a template that needs no tokenizer.

    reka:   `human: {question} <sep> assistant: {answer} <sep>`; a truncated answer gets the stop too, because the model
            was trained on finished turns
    answer: the answer alone, after its reasoning where there is one
    """
    if template == "reka":
        return render_prompt(item.prompt) + render_completion(item.reasoning, item.answer)
    return item.answer if item.reasoning is None else f"{item.reasoning}\n\n{item.answer}"


def encode_reward_model_input(
    item: RewardModelInput, tokenizer: PreTrainedTokenizerBase, template: Template, *, max_length: int
) -> RewardModelIds:
    """Encode an input for a classifier, and cut the beginning where it is longer than `max_length` ids.

    A decoder's input begins with a bos token, also after a cut, where its family was trained with one (families.py).

    reka:          the text of `render_text`
    chat_template: the tokenizer's chat template
    pair:          the last message of the prompt and the answer, as the two texts of an encoder
    answer:        the answer alone
    """
    first: list[int] = []
    if template == "reka":
        # Prompt and answer are encoded separately, as in a training row: no token spans both.
        second = encode_text(render_prompt(item.prompt), tokenizer)
        second += encode_text(render_completion(item.reasoning, item.answer), tokenizer)
    elif template == "chat_template":
        # The template writes special tokens, which must be parsed as such; the messages are cleared of them before.
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in item.prompt]
        turns.append({"role": "assistant", "content": render_text(item, "answer")})
        neutral = [{**turn, "content": break_special_tokens(turn["content"], tokenizer)} for turn in turns]
        text = tokenizer.apply_chat_template(neutral, tokenize=False)
        return _frame([], tokenizer(text, add_special_tokens=False)["input_ids"], [], [], max_length)
    else:
        first = encode_text(item.prompt[-1]["content"], tokenizer) if template == "pair" else []
        second = encode_text(render_text(item, "answer"), tokenizer)
        if not second:  # transformers encodes an empty second text as no second text
            first, second = [], first
    if is_encoder(tokenizer):
        before, after = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    else:
        before, after = list(bos_ids(tokenizer)), []
    return _frame(first + after if first else [], second, before, after, max_length)


def break_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text with a space inside every name of a special token: `< |im_end|>`."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    broken = text
    while present := [name for name in names if name in broken]:
        for name in present:
            broken = broken.replace(name, f"{name[0]} {name[1:]}")
    return broken


def break_markup(text: str) -> str:
    """Return the text with a space inside every possible special token, for a server with an unknown tokenizer.

    Servers parse the name of a special token as that token even in the middle of a message.

    >>> break_markup("<|im_end|> </s> [/INST] a < b")
    '< |im_end|> < /s> [ /INST] a < b'
    """
    return _MARKUP.sub(lambda match: f"{match[0]} ", text)


def _frame(first: list[int], second: list[int], before: list[int], after: list[int], max_length: int) -> RewardModelIds:
    """Return `before`, `first`, `second` and `after`, without the first ids of `first + second` that do not fit."""
    room = max_length - len(before) - len(after)
    surplus = max(0, len(first) + len(second) - room)
    first_kept = first[surplus:]
    second_kept = second[max(0, surplus - len(first)) :]
    return RewardModelIds(
        input_ids=before + first_kept + second_kept + after,
        token_type_ids=[0] * (len(before) + len(first_kept)) + [int(bool(first))] * (len(second_kept) + len(after)),
        is_cut=surplus > 0,
    )
