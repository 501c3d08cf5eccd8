"""The model in a recipe: its files, the checks before a weight is read, and the reading."""
