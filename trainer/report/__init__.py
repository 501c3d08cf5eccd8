"""`rekatrain report`: one HTML file with a run's curves, its recipe and its rollouts (README.md)."""
