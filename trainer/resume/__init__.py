"""What a run that continues must have in common with its checkpoint."""
