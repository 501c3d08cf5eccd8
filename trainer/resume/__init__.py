"""The properties that a run and the checkpoint that it continues must share."""
