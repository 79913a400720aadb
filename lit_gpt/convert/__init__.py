"""Checkpoints of other projects, in and out: tables of names, and nothing else knows them."""
