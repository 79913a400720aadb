"""Work-arounds for PyTorch Lightning: what each waits for, and when it can go.

All were seen in Lightning 2.6.6. Where Lightning wants a method overridden, the override is one line that calls a
function of this file. Work-arounds that are the whole subject of another file stay there:

- `checkpoint/lightning_io.py`: Lightning writes a checkpoint in the system's temporary folder and moves it, which is
  a copy across file systems. It can go when `TorchCheckpointIO` writes beside the file and renames.
- `data/loader.py`, `data/datamodule.py`: Lightning saves the state of rank 0's loader only, and counts local
  micro-batches, which another number of ranks or another accumulation makes wrong (`align_progress`).
- `checkpoint/format.py`, `resolve_ckpt_path`: Lightning looks for `--ckpt_path last` in the new run's own empty
  folder, warns and trains from scratch. It can go when Lightning looks in earlier runs and fails where there is none.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_gpt.files.atomic import atomic_write
from lit_gpt.train.optim import clip_gradients

# Command line --------------------------------------------------------------------------------------------------------


class CheckpointKeepsFlags:
    """Mixin for a LightningCLI, named before it: the values in the file of `--ckpt_path` do not override the flags.

    The program makes them parser defaults instead. Waits for Lightning's pull request 21455, which does the same; it
    can go with the first release that has it, if that release reads the file before it checks required arguments.
    """

    def _parse_ckpt_path(self) -> None:
        """Nothing, where LightningCLI would merge the checkpoint's hyperparameters over what was parsed."""


class EpochProgressBar(RichProgressBar):
    """A progress bar that says "Epoch 0" where steps or time end the run; Lightning's says "Epoch 0/-2".

    It can go when Lightning's leaves the number of epochs out where there is none.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        described = super()._get_train_description(current_epoch)
        return described.replace("/-2", "").ljust(len(described)) if self.trainer.max_epochs == -1 else described


class SaveWholeConfig(SaveConfigCallback):
    """Writes the run's config.yaml whole or not at all, and over the one that is there.

    Lightning's refuses a folder that has one, though a resumed run goes on in the folder of its first part, and opens
    the file before it has the text, so that on a full disk half a file takes the place of a whole one. It can go when
    Lightning writes atomically and a resumed run may write there.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **options)
        self._folder = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask for the folder on all ranks, because that communicates."""
        self._folder = str(trainer.log_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file; on rank 0 only."""
        text = self.parser.dump(self.config, skip_none=False)
        with atomic_write(Path(self._folder) / self.config_filename, "w") as file:
            file.write(text)


_UNWANTED = (
    "litlogger",
    "litmodels",
    "TPU available",
    "Seed set to",  # before a refusal, too, which is to be one line; the seed is in config.yaml
    "Detected KeyboardInterrupt",
    "An SIGTERMException was raised",
)


class _WithoutUnwanted(logging.Filter):
    """Drops what recommends services of Lightning's maker, what is not used, and what the program says itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in _UNWANTED)


def silence_lightning() -> None:
    """Drop the advertisements that Lightning logs at every start, and two warnings that no user can act on.

    The warnings: PyTorch's deprecation of a class that Lightning itself uses (`LeafSpec`), and that a checkpoint was
    made with other callbacks, which is so whenever `validate` reads one. Each can go when Lightning no longer says it.
    """
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_WithoutUnwanted())
    for message in (".*LeafSpec.*", ".*callbacks used to create the checkpoint.*"):
        warnings.filterwarnings("ignore", message=message)


# Training ------------------------------------------------------------------------------------------------------------


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run; -1 if it has no end.

    `estimated_stepping_batches` builds the data loader early, so that a resume would silently lose the loader's
    state: it is read only where the number of steps is not given. Waits for Lightning's issue 20550; then the property
    alone is enough.
    """
    if trainer.max_steps > 0:
        return trainer.max_steps
    total = trainer.estimated_stepping_batches
    return -1 if total == float("inf") else int(total)


def clip_module_gradients(parameters: Iterable[Tensor], clip_val: float | None, algorithm: str | None) -> Tensor:
    """The body of a module's `configure_gradient_clipping`: clip by norm or value; the norm before, by value after.

    Lightning's own clipping refuses fused AdamW under bf16-mixed, as if there were a gradient scaler: its issue 21435,
    pull request 21436. With a release that has that, `LightningModule.clip_gradients` clips as well; this stays as
    long as the norm is to be checked without being computed twice.

    Args:
        parameters: with their gradients.
        clip_val: the Trainer's `gradient_clip_val`.
        algorithm: `value`, or the norm for anything else.
    """
    parameters = list(parameters)
    if algorithm == "value" and clip_val is not None:
        torch.nn.utils.clip_grad_value_(parameters, clip_val)
        clip_val = None
    return clip_gradients(parameters, clip_val)


def log_scalars(module: L.LightningModule, scalars: dict[str, Any]) -> None:
    """Numbers or scalar tensors to all loggers of `module`, at the number of optimizer steps done.

    `LightningModule.log` counts from 0 and, after a resume in the middle of an epoch, misses its own turns. It can go
    when a resumed run logs at the same steps as one that was never stopped.
    """
    values = {name: float(value) for name, value in scalars.items()}
    for logger in module.loggers:
        logger.log_metrics(values, step=module.global_step)


# Resuming ------------------------------------------------------------------------------------------------------------


def begin_next_epoch(fit_loop: dict[str, Any]) -> None:
    """Correct the loop state of a run that ended with its epoch, in place.

    Lightning resets its count of batches when the next epoch starts, so that a checkpoint from after the last epoch
    holds a full count: resumed to train on, it would make one batch of the next epoch and skip the rest. No issue is
    known; it can go when `test_a_run_stopped_at_an_epochs_end_goes_on_as_if_it_had_not` passes without it.
    """
    epoch, batch = fit_loop["epoch_progress"]["current"], fit_loop["epoch_loop.batch_progress"]
    if batch["is_last_batch"] and epoch["completed"] == epoch["ready"] > 0:
        batch["current"] = dict.fromkeys(batch["current"], 0)
        batch["is_last_batch"] = False


def reopen_unfinished_epoch(fit_loop: dict[str, Any]) -> None:
    """Correct the loop state of a run that `should_stop` ended in the middle of an epoch, in place.

    Lightning counts that epoch as done, so that a run that is limited by epochs or time would leave the rest of it out,
    and begin to count batches anew. Runs limited by steps go on by those. No issue is known; it can go when
    `test_a_run_that_time_ended_goes_on_in_the_middle_of_its_epoch` passes without it.
    """
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    is_counted = epoch["current"]["processed"] == epoch["current"]["ready"] > 0
    if is_counted and batch["current"]["completed"] > 0 and not batch["is_last_batch"]:
        for counts in (epoch["current"], epoch["total"]):
            counts["processed"] -= 1
            counts["completed"] = min(counts["completed"], counts["processed"])


def repeat_unfinished_validation(fit_loop: dict[str, Any]) -> bool:
    """Correct the loop state of a run that was stopped in a validation, in place: a resumed run begins it again.

    Lightning would skip it, or go on with its middle, though the sums of its first part are in no checkpoint. No issue
    is known; it can go when `test_a_run_stopped_in_a_validation_begins_it_again` passes without it.

    Returns:
        Whether there is one to repeat: then `RepeatedValidation` is needed too.
    """
    progress = fit_loop["epoch_loop.val_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    is_begun = current["ready"] > 0 and not progress["is_last_batch"]
    completed = total["completed"] - (current["completed"] if is_begun else 0)
    unfinished = is_begun or (current["ready"] == 0 and total["started"] > total["completed"])
    if is_begun:
        progress["current"] = dict.fromkeys(current, 0)
    # One that is started and not processed is how Lightning tells that it was stopped there.
    progress["total"] = dict.fromkeys(total, completed) | dict.fromkeys(("ready", "started"), completed + unfinished)
    return bool(unfinished)


class RepeatedValidation:
    """Has a resumed run begin with the validation that it was stopped in, though all its steps are made.

    Lightning returns at once where `max_steps` are made, and repeats a validation only where its interval has one: the
    one after the last step, or after the last that a budget of time allows, would be lost with its checkpoints. It can
    go when `test_a_run_stopped_in_its_last_validation_ends_as_if_it_had_not` passes without it.
    """

    def __init__(self, trainer: L.Trainer, step: int) -> None:
        """From `on_fit_start` on, for a checkpoint of that step."""
        self._loop = trainer.fit_loop.epoch_loop
        self._max_steps = self._loop.max_steps
        if 0 <= self._max_steps <= step:
            self._loop.max_steps = step + 1
        self._loop._should_check_val_fx = lambda data_fetcher: True  # type: ignore[method-assign]

    def begin(self) -> None:
        """It has begun: the batch that stood for it in the counts goes."""
        total = self._loop.val_loop.batch_progress.total
        total.ready = total.started = total.completed  # type: ignore[attr-defined]

    def end(self) -> None:
        """It is done: the run ends, or goes on, as any other."""
        self._loop.max_steps = self._max_steps
        del self._loop._should_check_val_fx


# Signals -------------------------------------------------------------------------------------------------------------


class StopRequest:
    """The signal that asked this run to stop, and handlers that replace Lightning's and Python's own.

    Lightning's for SIGTERM communicates inside the signal, which can lock the ranks up (issue 20806), and stops between
    two micro-batches of one step, whose gradient is then lost. KeyboardInterrupt can come in the middle of an update,
    and the torn weights would be saved; and Lightning exits with 1 after it. It can go when Lightning's ranks agree on
    the end outside the handlers and after a whole optimizer step.

    Attributes:
        number: of the signal that the ranks have agreed on, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0
        self._installed_for: L.Trainer | None = None

    def install(self, trainer: L.Trainer) -> None:
        """Replace the handlers, once; Lightning puts back what was there before the run."""
        if self._installed_for is trainer or threading.current_thread() is not threading.main_thread():
            return
        self._installed_for, self.number, self._received = trainer, 0, 0

        def on_signal(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._received:
                _end_at_once(trainer)
            if number == signal.SIGTERM and not self._received:
                _signal_children(trainer, number)
            self._received = self._received or number

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def agree(self, trainer: L.Trainer, device: torch.device) -> None:
        """Between two batches: if any rank received a signal, Lightning ends the run of all here."""
        self.number = self._received
        if trainer.world_size > 1:
            flag = torch.tensor(self._received, device=device)
            self.number = int(trainer.strategy.reduce(flag, reduce_op="max"))
        trainer._signal_connector.received_sigterm = self.number > 0


def _signal_children(trainer: L.Trainer, number: int) -> None:
    """Send a signal to the processes that this one has started."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(number)


def _end_at_once(trainer: L.Trainer) -> NoReturn:
    """Leave without saving: the files of checkpoints appear whole or not at all."""
    _signal_children(trainer, signal.SIGKILL)
    os.write(2, b"\nlit_gpt: interrupted twice: ended without saving; the last checkpoint is whole\n")
    os._exit(128 + signal.SIGINT)


def exit_on_sigterm(trainer: L.Trainer) -> None:
    """Have SIGTERM end this process at once with 143, where Lightning finishes the loop first or leaves with 0.

    It can go when Lightning's evaluation and prediction do so.
    """

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        _signal_children(trainer, number)
        exception = SIGTERMException()
        set_signal_status(trainer, exception, number)
        raise exception

    if trainer.state.fn != "fit" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)


def set_signal_status(trainer: L.Trainer, exception: BaseException, number: int) -> None:
    """Exit with 143 after SIGTERM and 130 after SIGINT, where Lightning exits with 0: the run was cut short.

    Processes that rank 0 has started leave with 0: Lightning's watcher kills rank 0 when one of them fails. It can go
    when `SIGTERMException` carries a status of its own.
    """
    if isinstance(exception, SIGTERMException):
        launched = trainer.strategy.launcher is not None and trainer.local_rank > 0
        exception.code = 0 if launched else 128 + (number or signal.SIGTERM)


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Let KeyboardInterrupt out of a Trainer, which turns it into `sys.exit(1)` without a word.

    It can go when Lightning raises it again.
    """
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


# Several processes ---------------------------------------------------------------------------------------------------

_own_observer = subprocess_script._launch_process_observer


def observe_children(on_start: Callable[[list[subprocess.Popen[Any]]], None] | None) -> None:
    """Hand the processes that Lightning starts as ranks to `on_start`; None puts Lightning's own observer back.

    That one kills all with SIGKILL, the parent too, up to five seconds after one of them has failed: no line says why,
    and what rank 0 could still save is lost. It can go when Lightning's observer can be told what to do.
    """
    subprocess_script._launch_process_observer = on_start or _own_observer  # type: ignore[assignment]
