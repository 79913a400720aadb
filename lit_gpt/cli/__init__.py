"""The subcommands that Lightning's CLI drives, fit, validate, test and predict; and chat."""

import os

if os.environ.keys() & {"LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"}:  # of several processes
    # torch reads it when imported: the loss of a rank is one line of ours, without stack traces from its store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
