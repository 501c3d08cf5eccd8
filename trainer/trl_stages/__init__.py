"""The common part of the stages on TRL's trainers."""
