"""A recipe: one YAML file is one run, and each of its sections is the keyword arguments of one callable.

Nothing is declared twice. An unknown key, a missing one or a value of the wrong type stops the run before a weight is
loaded, and the message names the nearest known key. Scalars are YAML 1.2's: `1e-6` is a number, `no` is a string.
Loading a recipe imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

Section = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. A section that is present is a feature that is on; `null` takes it out again.

    stage:        what `train` does
    output_dir:   the run folder
    seed:         every random choice of the run follows from it
    model:        `trainer.models.load_model`
    lora:         `peft.LoraConfig`; without it all weights are trained
    chat:         what is made of a row: `trainer.sft.encode_conversations`, `trainer.reward_model.pairs.encode_pairs`
    dataset:      `data.sources.load_rows`, what is trained on
    eval_dataset: `data.sources.load_rows`, what `evaluate` asks
    sft:          `trl.SFTConfig`
    reward:       `trl.RewardConfig`
    rloo:         `trainer.rloo.config.RLOOConfig`
    rewards:      name of a reward -> its weight and options (rewards/README.md)
    scoring:      `rewards.grader.ScoringConfig`, how they are run
    evaluate:     `trainer.evaluate.EvaluateConfig`
    wandb:        `wandb.init`; without it nothing is tracked outside the run folder
    """

    stage: Literal["sft", "reward", "rloo"]
    output_dir: str
    model: Section
    dataset: Section
    seed: int = 0
    lora: Section | None = None
    chat: Section = field(default_factory=dict)
    eval_dataset: Section | None = None
    sft: Section = field(default_factory=dict)
    reward: Section = field(default_factory=dict)
    rloo: Section = field(default_factory=dict)
    rewards: dict[str, Section | None] = field(default_factory=dict)
    scoring: Section = field(default_factory=dict)
    evaluate: Section = field(default_factory=dict)
    wandb: Section | None = None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `dotted.key=value` overrides to it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no recipe at {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    check_keywords("recipe", tree, Recipe)
    return Recipe(**tree)


def dump_recipe(recipe: Recipe) -> str:
    """YAML text of the resolved recipe; `load_recipe` of it gives the same recipe."""
    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel types it as None
    yaml.dump({key: value for key, value in asdict(recipe).items() if value is not None}, text)
    return text.getvalue()


def differing_keys(recipe: Recipe, other: Recipe) -> list[str]:
    """Dotted keys whose values differ between two recipes."""
    ours, theirs = _flatten(asdict(recipe)), _flatten(asdict(other))
    return [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]


def _parse_yaml(text: str, where: str) -> Any:  # whatever the YAML holds
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise InputError(f"{override!r} is not an override; write dotted.key=value")
    *sections, last = dotted.split(".")
    node = tree
    for depth, key in enumerate(sections):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise InputError(f"{override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    node[last] = _parse_yaml(text, f"the override {override!r}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
