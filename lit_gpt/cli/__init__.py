"""The subcommands that Lightning's CLI drives: fit, validate, test, predict."""

import os

# Read when torch is imported: the loss of a rank is one line of ours, without the stack traces of its store's warnings.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
