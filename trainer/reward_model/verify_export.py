"""Check an exported reward model from a fresh process: `python -m ... FOLDER DTYPE REFERENCE`.

REFERENCE is a JSON file with prompts, completions and the scores that the exporting process computed.
"""

import json
import sys
from pathlib import Path

from rekatrain.rewards.models.classifier import read_card
from rekatrain.rewards.models.local import RewardModel


def main() -> None:
    """Print what was verified; an AssertionError says what was not."""
    folder, dtype, reference_file = sys.argv[1:]
    reference = json.loads(Path(reference_file).read_text(encoding="utf-8"))
    card = read_card(folder)
    assert card is not None, "no reward_model.json"
    reward = RewardModel(pretrained_model_name_or_path=folder, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    reward.setup()
    rewards = reward(reference["prompts"], reference["completions"])
    errors = []
    for value, score in zip(rewards, reference["scores"], strict=True):
        assert isinstance(value, float), value
        errors.append(abs(value * card.std + card.mean - score))
    # The same weights in the same arithmetic: only the order of sums may differ.
    tolerance = (1e-4 if dtype == "float32" else 5e-2) * max(card.std, 1.0)
    assert max(errors) <= tolerance, f"a score differs by {max(errors)} from the training model's"
    print(f"verified in another process: tokenizer, template, scale, scores within {max(errors):.1e}")


if __name__ == "__main__":
    main()
