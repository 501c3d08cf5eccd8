"""Estimate what a run needs before it starts: memory by part and phase, arithmetic, traffic and time."""
