"""Verify an exported reward model: `python -m rekatrain.trainer.export.verify_reward_model FOLDER REFERENCE`.

REFERENCE is a JSON file with the dtype, prompts, completions, and the scores that the exporting process computed.
"""

import json
import sys
from pathlib import Path

from rekatrain.rewards.models.classifier import read_card
from rekatrain.rewards.models.local import RewardModel


def main() -> None:
    """Print the verified properties, or raise AssertionError at the first that does not hold."""
    folder, reference_file = sys.argv[1:]
    reference = json.loads(Path(reference_file).read_text(encoding="utf-8"))
    dtype = reference["dtype"]
    card = read_card(folder)
    assert card is not None, "no reward_model.json"
    reward = RewardModel(pretrained_model_name_or_path=folder, dtype=dtype)
    reward.setup()
    rewards = reward(reference["prompts"], reference["completions"])
    errors = []
    for value, score in zip(rewards, reference["scores"], strict=True):
        assert isinstance(value, float), value
        errors.append(abs(value * card.std + card.mean - score))
    # Same weights, same arithmetic: only the order of sums may differ.
    tolerance = (1e-4 if dtype == "float32" else 5e-2) * max(card.std, 1.0)
    assert max(errors) <= tolerance, f"a score differs by {max(errors)} from the training model's"
    print(f"verified in a fresh process: tokenizer, template, scale, scores within {max(errors):.1e}")


if __name__ == "__main__":
    main()
