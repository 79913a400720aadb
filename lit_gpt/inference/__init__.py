"""The fastest form of a model on this machine."""
