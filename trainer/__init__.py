"""How weights move: recipes, model loading, SFT, RLOO, evaluation and export."""
