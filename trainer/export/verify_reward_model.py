"""Verify an exported reward model: `python -m rekatrain.trainer.export.verify_reward_model FOLDER REFERENCE`.

REFERENCE is a JSON file with prompts, completions, and the scores that the exporting process computed from the stored
weights. Both compute in float32, and read one layer at a time.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rekatrain.data.tokenizer import load_classifier_tokenizer
from rekatrain.rewards.models.classifier import read_card, set_pad
from rekatrain.rewards.models.local import RewardModel
from rekatrain.trainer.export.lazy_weights import LazyWeights, streaming
from rekatrain.trainer.models.source import find_source


class StreamedRewardModel(RewardModel):
    """The reward `reward_model`, whose layers are read from the files when they are called."""

    def _load(self, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        weights = LazyWeights(find_source(self._path), auto_class=AutoModelForSequenceClassification)
        self._streamed = streaming(weights)
        model, tokenizer = self._streamed.__enter__(), load_classifier_tokenizer(self._path)
        set_pad(model, tokenizer)
        return model, tokenizer


def main() -> None:
    """Print the verified properties, or raise AssertionError at the first that does not hold."""
    folder, reference_file = sys.argv[1:]
    reference = json.loads(Path(reference_file).read_text(encoding="utf-8"))
    card = read_card(folder)
    assert card is not None, "no reward_model.json"
    reward = StreamedRewardModel(pretrained_model_name_or_path=folder)
    reward.setup()
    rewards = reward(reference["prompts"], reference["completions"])
    errors = []
    for value, score in zip(rewards, reference["scores"], strict=True):
        assert isinstance(value, float), value
        errors.append(abs(value * card.std + card.mean - score))
    # Same weights, same arithmetic: only the order of sums may differ.
    tolerance = 1e-4 * max(card.std, 1.0)
    assert max(errors) <= tolerance, f"a score differs by {max(errors)} from the training model's"
    print(f"verified in a fresh process: tokenizer, template, scale, scores within {max(errors):.1e}")


if __name__ == "__main__":
    main()
