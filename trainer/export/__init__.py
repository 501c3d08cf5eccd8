"""Exports: a run's weights as a folder that servers load, a model card and a serving/ folder in it, and the proof."""
