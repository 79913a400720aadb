"""The sections of scripts/torture.py, one a file, and what they share."""
