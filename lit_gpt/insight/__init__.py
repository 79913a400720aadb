"""Inspection of models: size and memory, how tokens were chosen, tokenizers, verbatim training text in samples."""
