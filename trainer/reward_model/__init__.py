"""The reward stage: train and evaluate a reward model on preference rows."""
