"""How a completion is judged: the scorers, and their composition into the one number that RLOO maximises."""
