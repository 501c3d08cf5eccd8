"""The built-in rewards: name in a recipe -> where it is. As text, so that nothing is imported that no recipe names."""

REWARDS: dict[str, str] = {
    "math_answer": "rewards.rules:math_answer",
    "reasoning_format": "rewards.rules:reasoning_format",
    "reasoning_gym": "rewards.rules:reasoning_gym",
    "code_tests": "rewards.code_tests:CodeTests",
    "reward_model": "rewards.reward_model:RewardModel",
    "remote_reward_model": "rewards.remote_reward_model:RemoteRewardModel",
    "judge": "rewards.judge:Judge",
}
