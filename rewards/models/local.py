"""The reward `reward_model`: a local sequence classifier's score of the answer, on a fixed scale.

    rewards:
      reward_model: {pretrained_model_name_or_path: exports/reward, weight: 1.0}

torch and the model are loaded by `setup`, in the process that scores.
"""

import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import FiniteFloat

from rekatrain.data.chat import parse_completion, parse_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.locations import names_path
from rekatrain.data.reward_model_input import RewardModelInput, Template, check_template, encode_reward_model_input
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.ensemble import Ensemble, combine_members
from rekatrain.rewards.outcome import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEVICE = re.compile(r"cpu|(cuda|mps|xpu)(:\d+)?")


# File of a folder that holds no whole model -> its kind.
OTHER_KINDS = {"adapter_config.json": "an adapter, without its base", "recipe.yaml": "a run"}


def _check_is_model(folder: str) -> None:
    """Raise InputError for the folder of an adapter or of a run: neither holds a base with its trained head."""
    for file, kind in OTHER_KINDS.items():
        if (Path(folder) / file).is_file():
            raise InputError(
                f"pretrained_model_name_or_path: {folder!r} is {kind}, and the reward needs a whole classifier: "
                "merge it (rekatrain export RUN OUT, or PEFT's merge_and_unload) and name that folder"
            )


class RewardModel:
    """(score - mean) / std, where the score is a classifier's only output or the probability of one of its labels."""

    def __init__(
        self,
        *,
        pretrained_model_name_or_path: str | Annotated[list[str], MinLen(2)],
        ensemble: Ensemble = "mean",
        revision: str | None = None,
        template: Template | None = None,
        reasoning: bool | None = None,
        label: str | None = None,
        mean: FiniteFloat | None = None,
        std: Annotated[FiniteFloat, Gt(0)] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        micro_batch_tokens: Annotated[int, Ge(1)] = 8192,
    ) -> None:
        """Check the options; no weight is read.

        pretrained_model_name_or_path: a folder or a name on the hub; of an ensemble, a list of them
        ensemble:           mean or minimum of the scaled scores of a list; the metric `uncertainty` is their deviation
        template:           reka (default), chat_template, pair or answer, see data/reward_model_input.py
        reasoning:          judge the reasoning too; the default is to judge the answer alone
        label:              name of the output whose probability is the score, of a classifier with several outputs
        mean, std:          of the scores; default 0 and 1
        device:             cpu, cuda (this process's GPU) or cuda:1
        micro_batch_tokens: tokens of one forward, with padding

        The `reward_model.json` of an exported reward model sets the defaults of template, reasoning, mean and std.
        """
        if (mean is None) != (std is None):
            raise InputError(f"mean and std go together, but mean is {mean} and std is {std}; set both or neither")
        if not DEVICE.fullmatch(device):
            raise InputError(f"device is {device!r}; it should be cpu, cuda or one GPU such as cuda:1")
        self._ensemble = ensemble
        self._members: list[RewardModel] = []
        if isinstance(pretrained_model_name_or_path, list):
            options: dict[str, Any] = {
                "revision": revision,
                "template": template,
                "reasoning": reasoning,
                "label": label,
            }
            options |= {"mean": mean, "std": std, "dtype": dtype, "device": device}
            options["micro_batch_tokens"] = micro_batch_tokens
            self._members = [
                RewardModel(pretrained_model_name_or_path=member, **options) for member in pretrained_model_name_or_path
            ]
            return
        path = pretrained_model_name_or_path
        if names_path(path) and not Path(path).is_dir():
            raise InputError(f"pretrained_model_name_or_path: there is no reward model at {path!r}")
        _check_is_model(path)
        self._path, self._revision, self._label = path, revision, label
        self._template, self._reasoning, self._mean, self._std = template, reasoning, mean, std
        self._dtype, self._device, self._micro_batch_tokens = dtype, device, micro_batch_tokens
        self._num_cut = 0

    def setup(self) -> None:
        """Load the classifier, log its memory, and fix the scale of its scores."""
        from rekatrain.rewards.models import classifier

        for member in self._members:
            member.setup()
        if self._members:
            return
        card = classifier.read_card(self._path)
        self._template = self._template or (card.template if card else "reka")
        self._reasoning = self._reasoning if self._reasoning is not None else bool(card and card.reasoning)
        if self._mean is None or self._std is None:
            self._mean, self._std = (card.mean, card.std) if card else (0.0, 1.0)
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if self._device == "cuda" else self._device
        self._model, self._tokenizer = self._load(device)
        check_template(self._template, self._tokenizer)
        self._label_id = self._find_label()
        logger.info(
            "reward_model: %s, %s of %s in each process, besides the policy's; template %s, scores scaled by mean %.4g "
            "and std %.4g%s",
            self._path,
            classifier.memory_of(self._model),
            device,
            self._template,
            self._mean,
            self._std,
            "" if card or self._mean or self._std != 1.0 else " (as they are: the folder has no reward_model.json)",
        )

    def _load(self, device: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the classifier; the verification of an export reads it layer by layer."""
        from rekatrain.rewards.models import classifier

        return classifier.load_classifier(self._path, revision=self._revision, dtype=self._dtype, device=device)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Sequence[float | RewardError | Score]:
        """Return one normalized score per completion; an error if the score is not a finite number."""
        if self._members:
            members = [member(prompts, completions) for member in self._members]
            return combine_members(members, self._ensemble)
        from rekatrain.rewards.models import classifier

        judged = [
            RewardModelInput(
                prompt=parse_prompt(prompt), answer=parsed.answer, reasoning=self._thought(parsed.reasoning)
            )
            for prompt, parsed in zip(prompts, map(parse_completion, completions), strict=True)
        ]
        assert self._template is not None, "setup() comes first"
        context = classifier.context_of(self._model)
        rows = [encode_reward_model_input(one, self._tokenizer, self._template, max_length=context) for one in judged]
        self._num_cut += sum(row.is_cut for row in rows)
        # With the template `answer` and a tokenizer without special tokens, an empty answer has no tokens to score.
        filled = [row for row in rows if row.input_ids]
        logits_NC = classifier.classify(self._model, filled, micro_batch_tokens=self._micro_batch_tokens)
        scores_N = logits_NC[:, 0] if self._label_id is None else logits_NC.softmax(dim=-1)[:, self._label_id]
        scores = iter(scores_N.tolist())
        return [
            self._scaled(next(scores))
            if row.input_ids
            else RewardError("the answer is empty: there is nothing to score")
            for row in rows
        ]

    def _scaled(self, score: float) -> float | RewardError:
        assert self._mean is not None and self._std is not None, "setup() comes first"
        return (score - self._mean) / self._std if math.isfinite(score) else RewardError(f"the score is {score}")

    def metrics(self) -> dict[str, float]:
        """Return the number of answers since the last call whose beginning was cut off to fit the context."""
        if self._members:
            return {"num_cut": sum(member.metrics()["num_cut"] for member in self._members)}
        counted = {"num_cut": float(self._num_cut)}
        self._num_cut = 0
        return counted

    def _thought(self, reasoning: str | None) -> str | None:
        return reasoning if self._reasoning else None

    def _find_label(self) -> int | None:
        """Return the index of the output that is the score; None for the only one."""
        from rekatrain.rewards.models import classifier

        names = classifier.label_names(self._model)
        if len(names) == 1 and self._label is None:
            return None
        if self._label not in names or len(names) == 1:
            wanted = f"label {self._label!r} is not one of them" if self._label else "name the one that is the reward"
            raise InputError(f"the classifier {self._path!r} has the labels {', '.join(names)}: {wanted} (label:)")
        return names.index(self._label)

    _model: "PreTrainedModel"
    _tokenizer: "PreTrainedTokenizerBase"
