"""Exports: a run's weights as a verified folder that servers load, with a model card and serving/."""
