"""The reward stage: a reward model from preference rows."""
