"""The processes of a launch: their agreement, interruption and failure."""
