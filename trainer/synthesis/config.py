"""The sections `generate:` and `filter:` of a recipe. Importing this file imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, MinLen
from pydantic import FiniteFloat, JsonValue

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords, did_you_mean
from rekatrain.data.ranges import Count, CountOrZero, PositiveFraction, Seconds, Temperature, Zero

Text = Annotated[str, MinLen(1)]
Price = Annotated[FiniteFloat, Ge(0)]
Keep = Literal["all", "right", "best", "shortest_right", "above"]
RANGE_KEYS = ("min", "max")
Config = TypeVar("Config", bound="SynthesisConfig")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """An OpenAI-compatible endpoint that answers instead of the recipe's model: `server:` of `generate:` and `filter:`.

    base_url, model:   of the endpoint: http://HOST:PORT/v1, and the name of the model in requests
    format:            chat sends messages to /chat/completions, and the server's own chat template renders them, so a
                       teacher may have any format; reka sends the rendered prompt as ids to /completions, for a server
                       of a model with the recipe's tokenizer, such as one of `rekatrain serve-rollouts`
    reasoning_tags:    opening and closing tag of the reasoning in the content of an answer; a field reasoning_content
                       or reasoning is read anyway
    api_key_env:       name of the environment variable with the key
    concurrency, request_timeout, max_retries: see `rekatrain.rewards.models.endpoint.Endpoint`
    extra_body:        further keys of each request; null removes one of ours
    prompt_price, completion_price: price of a million tokens, for the cost in the progress
    """

    base_url: Text
    model: Text
    format: Literal["chat", "reka"] = "chat"
    reasoning_tags: list[Text] | None = None
    api_key_env: Text | None = None
    concurrency: Count = 16
    request_timeout: Seconds = 600.0
    max_retries: CountOrZero = 4
    extra_body: dict[str, JsonValue] = field(default_factory=dict)
    prompt_price: Price | None = None
    completion_price: Price | None = None

    def __post_init__(self) -> None:
        if (self.prompt_price is None) != (self.completion_price is None):
            raise InputError("server: prompt_price and completion_price go together; set both or neither")
        if self.reasoning_tags is not None and len(set(self.reasoning_tags)) not in (2, 4):
            raise InputError(f"server.reasoning_tags must be two tags, or four, but it is {self.reasoning_tags}")
        if self.reasoning_tags is not None and self.format == "reka":
            raise InputError("server.reasoning_tags goes with format chat: the Reka format has its own tags")


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """The keys that `generate:` and `filter:` have in common.

    out:                   folder for the rows and for all answers; a second start goes on there, and asks nothing twice
    num_generations:       completions per prompt
    max_completion_length: tokens after which a completion is cut off
    temperature:           0 takes the most likely token
    top_p, top_k:          filters of the sampler
    per_device_generation_batch_size: completions that are sampled at the same time in this process
    reward:                rewards that decide: a completion is right if each of them that judges it is exactly 1.0;
                           None means all rewards of the recipe with a weight above 0
    server:                keywords of ServerConfig; None: the recipe's model answers, in this process
    """

    out: Text
    num_generations: Count = 4
    max_completion_length: Count = 512
    temperature: Zero | Temperature = 1.0
    top_p: PositiveFraction = 1.0
    top_k: Count | None = None
    per_device_generation_batch_size: Count = 64
    reward: Text | list[Text] | None = None
    server: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_generations > 1 and self.temperature == 0:
            raise InputError(
                f"num_generations {self.num_generations} at temperature 0 gives the same completion each time: set "
                "temperature"
            )

    @property
    def endpoint(self) -> ServerConfig | None:
        """The server, if one answers."""
        return None if self.server is None else ServerConfig(**self.server)

    @property
    def deciding(self) -> Sequence[str]:
        """Names of the deciding rewards that the section names."""
        return [self.reward] if isinstance(self.reward, str) else self.reward or []


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SynthesisConfig):
    """The section `generate:`; completions that were cut off or are empty are never kept.

    keep:           all; right: all right ones; best: the one with the highest total reward; shortest_right: the right
                    one with the fewest characters; above: those with a total reward of at least `threshold`
    threshold:      lowest total reward that is kept; for above, and optionally for best
    max_per_prompt: number of completions that a prompt keeps at most, those with the highest total reward first
    """

    keep: Keep = "right"
    threshold: FiniteFloat | None = None
    max_per_prompt: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == "above" and self.threshold is None:
            raise InputError("generate.keep is above: set generate.threshold, the lowest total reward to keep")
        if self.threshold is not None and self.keep not in ("above", "best"):
            raise InputError(
                f"generate.threshold goes with keep: above or best, but keep is {self.keep}: remove one of them"
            )


@dataclass(frozen=True, kw_only=True)
class FilterConfig(SynthesisConfig):
    """The section `filter:`.

    pass_rate: lowest and highest fraction of right completions of the prompts to keep, as {min: 0.1, max: 0.9}
    """

    pass_rate: dict[str, FiniteFloat] = field(default_factory=lambda: {"min": 0.1, "max": 0.9})

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.bounds
        if any(key not in RANGE_KEYS for key in self.pass_rate) or not 0 <= low <= high <= 1:
            raise InputError(f"filter.pass_rate must be {{min: 0.1, max: 0.9}} or one of the two, not {self.pass_rate}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest pass rate to keep."""
        return self.pass_rate.get("min", 0.0), self.pass_rate.get("max", 1.0)


def read_section(
    name: Literal["generate", "filter"],
    section: Mapping[str, Any] | None,
    rewards: Collection[str],
    config_class: type[Config],
) -> Config:
    """Return the config of a section; raise InputError where it is missing, or as `check_synthesis` does."""
    if section is None:
        raise InputError(f"the recipe has no {name} section: name the folder for the rows there, {name}: {{out: ...}}")
    check_synthesis(name, section, rewards)
    return config_class(**section)


def check_synthesis(name: Literal["generate", "filter"], section: Mapping[str, Any], rewards: Collection[str]) -> None:
    """Raise InputError for a key or a value of a section that is wrong, also in its `server:`.

    rewards: names of the recipe's rewards
    """
    config_class = GenerateConfig if name == "generate" else FilterConfig
    check_keywords(name, section, config_class)
    if section.get("server") is not None:
        check_keywords(f"{name}.server", section["server"], ServerConfig)
    config = config_class(**section)
    _ = config.endpoint
    for reward in config.deciding:
        if reward not in rewards:
            raise InputError(
                f"{name}.reward names {reward!r}, which is no reward of the recipe{did_you_mean(reward, rewards)}"
            )
    if not rewards and not (isinstance(config, GenerateConfig) and config.keep == "all"):
        hint = ", or set generate.keep to all" if name == "generate" else ""
        raise InputError(f"{name} scores completions by the recipe's rewards: add a rewards section{hint}")
