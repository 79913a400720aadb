"""The callbacks of every `fit`, and the progress bar."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from lit_gpt.train.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lit_gpt.train.callbacks.non_finite import NonFiniteStop
from lit_gpt.train.callbacks.rank_progress import RankProgress
from lit_gpt.train.callbacks.run_log import RunLogWriter
from lit_gpt.train.callbacks.run_summary import RunSummary
from lit_gpt.train.callbacks.stop_signals import StopOnSignal
from lit_gpt.train.callbacks.throughput import Throughput
from lit_gpt.train.lightning_fixes import EpochProgressBar


def default_callbacks() -> list[Callback]:
    """What every `fit` has. Samples are apart, since they have settings; the progress bar, since it can be off."""
    throughput = Throughput()
    return [
        RankProgress(),
        throughput,
        NonFiniteStop(),
        RunSummary(),
        RunLogWriter(throughput),
        StopOnSignal(),
        BestCheckpoint(),
        LastCheckpoint(),
    ]


def progress_bar() -> EpochProgressBar:
    """Progress on stderr: stdout is for results."""
    return EpochProgressBar(refresh_rate=10, console_kwargs={"stderr": True})
