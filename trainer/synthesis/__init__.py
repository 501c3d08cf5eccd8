"""Data that is made here: `rekatrain generate` writes SFT rows, `rekatrain filter` keeps prompts by their pass rate."""
