"""Recipes: one YAML file is one run, and each of its sections is the keyword arguments of one callable.

Nothing is declared twice. An unknown key, a missing key or a value of the wrong type stops the run before a weight is
loaded, and the message names the nearest known key. Scalars follow YAML 1.2: `1e-6` is a number, `no` is a string.
Loading a recipe imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from ruamel.yaml import YAML

from rekatrain import RECIPES
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import held_out_section
from rekatrain.data.options import check_keywords, shorten
from rekatrain.trainer.recipe.yaml_text import MAX_CHARACTERS, MAX_DEPTH, parse_yaml

Section = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. A section that is present is a feature that is on; `null` removes it.

    stage:        the stage that `train` runs
    output_dir:   the run folder
    seed:         the source of every random choice of the run
    model:        keywords of `trainer.models.load.load_model`
    lora:         keywords of `peft.LoraConfig`; without it all weights are trained
    chat:         keywords of `data.training_rows.encode_rows`; in stage reward those of
                  `trainer.reward_model.pairs.encode_pairs`
    dataset:      keywords of `data.sources.load_rows`: the rows to train on; or several of those (`data/mixture.py`)
    eval_dataset: the same for the held-out rows; without it, those that `dataset.split` cuts
    sft:          keywords of `trl.SFTConfig`
    reward:       keywords of `trl.RewardConfig`
    rloo:         keywords of `trainer.rloo.config.RLOOConfig`
    rewards:      name of a reward -> its weight and options (rewards/README.md)
    scoring:      keywords of `rewards.scoring.ScoringConfig`
    evaluate:     keywords of `trainer.held_out_prompts.EvaluateConfig`
    generate:     keywords of `trainer.synthesis.config.GenerateConfig`
    filter:       keywords of `trainer.synthesis.config.FilterConfig`
    launch:       keywords of `trainer.launch.section.LaunchConfig`, for `rekatrain launch`
    wandb:        keywords of `wandb.init`; without a tracker nothing is recorded outside the run folder
    tensorboard:  keywords of `torch.utils.tensorboard.SummaryWriter`; log_dir is by default in the run folder
    trackio:      keywords of `trackio.init`

    on_nonfinite:        an update whose gradient is not finite is never applied. stop: write its batch to the run
                         folder and end the run; skip: go on without the update
    max_nonfinite_skips: number of skipped updates after which the run stops anyway
    stop_if:             keywords of `trainer.run.guards.StopConfig`: bounds of metrics beyond which the run stops
    time_limit:          time after which the run has saved and ended, with status 75: seconds, `3h50m` or `03:50:00`
    """

    stage: Literal["sft", "reward", "rloo"]
    output_dir: str
    model: Section
    dataset: Section | list[Section]
    seed: int = 0
    lora: Section | None = None
    chat: Section = field(default_factory=dict)
    eval_dataset: Section | list[Section] | None = None
    sft: Section = field(default_factory=dict)
    reward: Section = field(default_factory=dict)
    rloo: Section = field(default_factory=dict)
    rewards: dict[str, Section | None] = field(default_factory=dict)
    scoring: Section = field(default_factory=dict)
    evaluate: Section = field(default_factory=dict)
    generate: Section | None = None
    filter: Section | None = None
    launch: Section | None = None
    wandb: Section | None = None
    tensorboard: Section | None = None
    trackio: Section | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite_skips: Annotated[int, Ge(0)] = 10
    stop_if: Section = field(default_factory=dict)
    time_limit: float | str | None = None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `dotted.key=value` overrides to it.

    Raises InputError for a file that cannot be read, invalid YAML, an unknown section and a section of the wrong type.
    """
    tree = parse_yaml(_read(path), str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}")
    return build_recipe(tree, overrides)


def build_recipe(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Make a recipe of a mapping of sections, which the overrides change in place; InputError as for `load_recipe`."""
    for override in overrides:
        _apply_override(tree, override)
    check_keywords("recipe", tree, Recipe)
    held_out = held_out_section(tree["dataset"])
    if held_out is not None and tree.get("eval_dataset") not in (None, held_out):
        raise InputError("dataset.split holds rows out, and the recipe has an eval_dataset: remove one of them")
    return Recipe(**{**tree, "eval_dataset": held_out} if held_out else tree)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML text; `load_recipe` of that text gives an equal recipe."""
    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel types it as None
    yaml.dump({key: value for key, value in asdict(recipe).items() if value is not None}, text)
    return text.getvalue()


def _read(path: str | Path) -> str:
    """Return the text of a recipe file; InputError for one that does not exist, is too long or is not UTF-8."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(4 * MAX_CHARACTERS + 1)  # UTF-8 has at most four bytes per character
        if len(content) > 4 * MAX_CHARACTERS:
            raise InputError(f"the recipe {str(path)!r} has more than {MAX_CHARACTERS:,} characters")
        return content.decode("utf-8")
    except FileNotFoundError:
        is_shipped = (RECIPES.parent / path).is_file()
        hint = "; to write the shipped recipes there: rekatrain recipes recipes" if is_shipped else ""
        raise InputError(f"no recipe at {str(path)!r}{hint}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {str(path)!r} cannot be read: it is not UTF-8 ({error.reason})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        if isinstance(error, InputError):
            raise
        raise InputError(f"the recipe {str(path)!r} cannot be read: {error}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    *sections, last = dotted.split(".")
    if not equals or not all((*sections, last)) or len(sections) > MAX_DEPTH:
        raise InputError(f"{shorten(override)} is not an override; write dotted.key=value")
    node: Any = tree
    for depth, key in enumerate(sections):
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[_key_in(node, key, override)]
        if not isinstance(node, dict | list):
            raise InputError(f"{override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    node[_key_in(node, last, override)] = parse_yaml(text, f"the override {shorten(override)}")


def _key_in(node: dict[str, Any] | list[Any], key: str, override: str) -> Any:  # an index of a list, or a key
    """Return `key` as the index of an item where `node` is a list, such as the sources of a data set."""
    if isinstance(node, dict):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        raise InputError(f"{shorten(override)}: {key!r} is no index of a list with {len(node)} items, from 0")
    return int(key)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree of mappings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
