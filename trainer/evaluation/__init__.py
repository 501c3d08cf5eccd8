"""Evaluation on held-out prompts: answers, in process or of a server, and figures of them."""
