"""Requests to an OpenAI-compatible endpoint, and its replies as completions in the Reka format; nothing is sent."""

from collections.abc import Mapping
from typing import Any

from rekatrain.data.chat import END_OF_TEXT, STOP, FinishReason, Message, render_completion, split_turn
from rekatrain.data.errors import InputError
from rekatrain.data.finish import read_reasoning
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.synthesis.config import ServerConfig, SynthesisConfig
from rekatrain.trainer.synthesis.journal import Answer
from rekatrain.trainer.synthesis.requests import Question

PATHS = {"chat": "/chat/completions", "reka": "/completions"}
# Fields in which servers put the reasoning of a chat completion: DeepSeek's and llama.cpp's name, then vLLM's.
REASONING_FIELDS = ("reasoning_content", "reasoning")
MAX_TOKENS = 10**9  # of one reply; a server's larger number is none


def make_body(question: Question, server: ServerConfig, config: SynthesisConfig, seed: int) -> Json:
    """Return the body of the request for one completion."""
    body: Json = {
        "model": server.model,
        "max_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "seed": seed,
    }
    body |= {"top_p": config.top_p} if config.top_p < 1 else {}
    body |= {"top_k": config.top_k} if config.top_k is not None else {}
    if server.format == "chat":
        body["messages"] = [
            {"role": message["role"], "content": message["content"]} for message in question.prompt.row.prompt
        ]
    else:
        body["prompt"] = question.prompt.ids
        # vLLM's: otherwise `<s`, a special token and `ep>` would read as the stop.
        body |= {"stop": [STOP], "include_stop_str_in_output": True, "skip_special_tokens": False}
    return {key: value for key, value in (body | server.extra_body).items() if value is not None}


def read_reply(reply: Json, server: ServerConfig) -> Answer:
    """Return the completion of a reply; raise RewardError for one that holds none."""
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise RewardError(f"{server.base_url} answered without a choice; the answer has {', '.join(reply) or 'no key'}")
    usage = reply.get("usage")
    text, finish_reason = _read_chat(choice, server) if server.format == "chat" else _read_text(choice, server)
    return Answer(
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def _read_chat(choice: Mapping[str, Any], server: ServerConfig) -> tuple[str, FinishReason]:
    """Return a teacher's message as a completion in the Reka format; one that cannot be read was cut off."""
    sent = choice.get("message")
    content = sent.get("content") if isinstance(sent, dict) else None
    if not isinstance(sent, dict) or not isinstance(content, str | None):
        raise RewardError(f"{server.base_url} answered a choice without choices[0].message.content")
    fields = [sent[name] for name in REASONING_FIELDS if isinstance(sent.get(name), str) and sent[name].strip()]
    message: Message = {"role": "assistant", "content": content or ""}
    if fields:
        message["reasoning_content"] = fields[0]
    is_over = choice.get("finish_reason") == "stop"
    try:
        if server.reasoning_tags and any(tag in message["content"] for tag in server.reasoning_tags):
            message = read_reasoning(message, server.reasoning_tags)
    except InputError:
        is_over = False
    reasoning, answer = split_turn(message)
    if not is_over or not answer or STOP in answer or STOP in (reasoning or ""):
        return render_completion(reasoning, answer).removesuffix(f" {STOP}"), FinishReason.LENGTH
    return render_completion(reasoning, answer), FinishReason.STOP


def _read_text(choice: Mapping[str, Any], server: ServerConfig) -> tuple[str, FinishReason]:
    """Return the text of a completion in the Reka format up to its stop.

    vLLM returns the stop as part of the text, and null as the stop_reason of the eos token. Other servers leave both
    out, and say that the completion has stopped.
    """
    text = choice.get("text")
    if not isinstance(text, str):
        raise RewardError(f"{server.base_url} answered a choice without choices[0].text")
    body, stop, _ = text.partition(STOP)
    if stop:
        return body + stop, FinishReason.STOP
    if choice.get("finish_reason") != "stop":
        return body, FinishReason.LENGTH
    if "stop_reason" in choice and choice["stop_reason"] is None:
        return body.removesuffix(END_OF_TEXT) + END_OF_TEXT, FinishReason.EOS
    return body + STOP, FinishReason.STOP


def _count(usage: object, key: str) -> int:
    value = usage.get(key) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and 0 <= value <= MAX_TOKENS else 0
