"""RLOO: sample groups of completions, score them, and take one on-policy step (arXiv 2402.14740)."""
