"""What a run needs before it is started: memory by part and phase, arithmetic, traffic, time."""
