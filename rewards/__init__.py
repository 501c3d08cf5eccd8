"""Rewards: score completions, and combine the scores into the one number that RLOO maximizes.

The author of a reward imports from here, and nothing here imports torch:

    from rekatrain.rewards import ParsedCompletion

ParsedCompletion:       the argument of a scorer: reasoning, answer and finish_reason of one completion
FinishReason:           stop, eos or length (cut off)
InputError:             raise it for a wrong option, or for a row that the reward cannot be meant for: one line, and the
                        run stops
Score:                  a reward with metrics and notes, in place of a number
has_gold:               declares how a right answer of a row looks, for `rekatrain check-rewards`
RewardError:            a batch function returns one as the value of a completion that it could not grade
build_reward_functions: the rewards of a recipe's `rewards:` section as functions, for scripts

rewards/README.md says how to write a reward.
"""

from rekatrain.data.chat import FinishReason, ParsedCompletion
from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.gold import has_gold
from rekatrain.rewards.outcome import Score

__all__ = [
    "FinishReason",
    "InputError",
    "ParsedCompletion",
    "RewardError",
    "Score",
    "build_reward_functions",
    "has_gold",
]
