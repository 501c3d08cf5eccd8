"""The folder of a run: records, checkpoints, guards of its numbers."""
