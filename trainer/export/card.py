"""The model card of an export: README.md with the Hub's metadata, usage, training data, metrics and recipe."""

from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCard, ModelCardData

from rekatrain.data.locations import names_path
from rekatrain.data.mixture import source_paths
from rekatrain.trainer.models.source import Source
from rekatrain.trainer.recipe.load import Recipe, dump_recipe
from rekatrain.trainer.run.checkpoints import checkpoint_step
from rekatrain.trainer.run.folder import METRICS_FILE
from rekatrain.trainer.run.records import read_records

TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The metrics of one step are noise: the card shows means over the last recorded steps before the checkpoint.
NUM_LAST_STEPS = 10
SHOWN = {
    "sft": ("loss", "mean_token_accuracy", "eval_loss"),
    "reward": ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy"),
    "rloo": ("reward", "kl", "entropy", "completions/clipped_ratio", "frac_reward_zero_std"),
}
LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "llama.cpp", "reward": "transformers"}


def write_card(
    folder: Path, form: str, recipe: Recipe, run: Path, source: Source, *, name: str, evaluation: str | None = None
) -> None:
    """Write README.md into `folder`.

    form:       merged, adapter, gguf or reward
    run:        the run folder; its metrics.jsonl is read up to the step of the exported checkpoint
    evaluation: a measurement by the exporting process, as text
    """
    step = checkpoint_step(Path(source.folder))
    data_sets = source_paths(recipe.dataset)
    base = str(recipe.model["pretrained_model_name_or_path"])
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=[path for path in data_sets if _is_hub_id(path)] or None,
        library_name=LIBRARIES[form],
        pipeline_tag="text-classification" if form == "reward" else "text-generation",
        tags=["rekatrain", recipe.stage, *(["lora"] if form == "adapter" else [])],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        form=form,
        stage=recipe.stage,
        base=base,
        step=step,
        method="LoRA" if recipe.lora is not None else "all weights",
        data_set=", ".join(data_sets),
        rewards={reward: (settings or {}).get("weight", 1.0) for reward, settings in recipe.rewards.items()},
        metrics=last_metrics(run, recipe.stage, step),
        num_last_steps=NUM_LAST_STEPS,
        evaluation=evaluation,
        recipe=dump_recipe(recipe).rstrip(),
        files=sorted(path.name for path in folder.glob("*.gguf")),
        end_of_turn=recipe.chat.get("end_of_turn", "sep"),
        reasoning=bool(recipe.chat.get("reasoning", False)),
    )
    card.save(folder / "README.md")


def last_metrics(run: Path, stage: str, step: int) -> dict[str, float]:
    """Return the means of the shown metrics, and of every reward, over the last 10 recorded steps up to `step`."""
    records = [record for record in read_records(run / METRICS_FILE) if record["step"] <= step]
    names = [name for record in records for name in record if name in SHOWN[stage] or _is_reward_mean(name)]
    means = {}
    for name in dict.fromkeys(names):
        values = [record[name] for record in records if record.get(name) is not None][-NUM_LAST_STEPS:]
        if values:
            means[name] = fmean(values)
    return means


def _is_hub_id(text: str) -> bool:
    return text.count("/") == 1 and not names_path(text)


def _is_reward_mean(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")
