"""`lit_gpt remix`: how much of what a model writes is verbatim training text."""
