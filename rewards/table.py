"""The built-in rewards: name in a recipe -> where it is. As text, so that nothing is imported that no recipe names."""

REWARDS: dict[str, str] = {
    "math_answer": "rewards.math_answer:math_answer",
    "exact_match": "rewards.answers:exact_match",
    "numeric_close": "rewards.answers:numeric_close",
    "multiple_choice": "rewards.answers:multiple_choice",
    "regex": "rewards.answers:Regex",
    "json_schema": "rewards.answers:JsonSchema",
    "reasoning_gym": "rewards.answers:reasoning_gym",
    "code_tests": "rewards.code_tests:CodeTests",
    "reward_model": "rewards.reward_model:RewardModel",
    "remote_reward_model": "rewards.remote_reward_model:RemoteRewardModel",
    "judge": "rewards.judge:Judge",
    "instruction_following": "rewards.instructions:InstructionFollowing",
    "reasoning_format": "rewards.shape:reasoning_format",
    "length": "rewards.shape:Length",
    "repetition": "rewards.shape:repetition",
    "language": "rewards.shape:Language",
}
