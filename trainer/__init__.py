"""Training: recipes, model loading, SFT, reward models, RLOO, evaluation and export."""
