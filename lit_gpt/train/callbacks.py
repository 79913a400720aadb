"""What goes on around a training run: checkpoints, samples, and how a run ends, well or badly."""

from __future__ import annotations

import dataclasses
import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_gpt.console import note
from lit_gpt.generation.complete import complete, encode_prompt
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.train.module import LitGPT
from lit_gpt.train.throughput import Throughput


def default_callbacks() -> list[Callback]:
    """What every `fit` has. Samples are apart, since they have settings; the progress bar, since it can be off."""
    return [
        Throughput(),
        NonFiniteStop(),
        Endings(),
        best_checkpoint(),
        LastCheckpoint(),
    ]


def progress_bar() -> RichProgressBar:
    """Progress on stderr: stdout is for results."""
    return RichProgressBar(refresh_rate=10, console_kwargs={"stderr": True})


# Checkpoints ---------------------------------------------------------------------------------------------------------


def best_checkpoint() -> ModelCheckpoint:
    """`best.ckpt`: the weights with the lowest `val/loss` so far."""
    return ModelCheckpoint(filename="best", monitor="val/loss", mode="min", enable_version_counter=False)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`: the state after each validation, at the end, and when a run is interrupted.

    One name, written over whole by `AtomicCheckpointIO`: there is no moment without a good file.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_exception=True, enable_version_counter=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what came after the last validation."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


# Samples -------------------------------------------------------------------------------------------------------------


class Samples(Callback):
    """Continues fixed prompts after each validation and writes them to TensorBoard: one sees the model learn.

    The same seed each time, so that only the weights make the difference.
    """

    def __init__(
        self,
        prompts: list[str] = ["\n"],  # noqa: B006 (never changed; jsonargparse shows it as the default)
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 1,
        print_at_end: int = 0,
    ) -> None:
        """Samples of these prompts.

        Args:
            prompts: texts to continue; none for no samples.
            max_new_tokens: tokens of each continuation.
            temperature: of the draws.
            top_k: draw among this many likeliest tokens.
            seed: of the draws.
            print_at_end: how many samples of the first prompt to print to stdout after the last step, with what to try
                next.
        """
        self.prompts = prompts
        self.print_at_end = print_at_end
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the settings before any work is done. Raises UserError."""
        self.generation_config.check()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write samples to TensorBoard, each prompt its own entry."""
        assert isinstance(pl_module, LitGPT)
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or trainer.state.fn != "fit" or pl_module.tokenizer is None or not boards:
            return
        for index, (text,) in enumerate(self.write(trainer, pl_module, self.prompts, 1)):
            for board in boards:
                if trainer.is_global_zero:  # four blanks make Markdown show the text as it is
                    shown = "    " + (self.prompts[index] + text).replace("\n", "\n    ")
                    board.experiment.add_text(f"samples/{index}", shown, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print samples and what to try next."""
        assert isinstance(pl_module, LitGPT)
        if not self.print_at_end or not self.prompts or pl_module.tokenizer is None:
            return
        pl_module.eval()
        (texts,) = self.write(trainer, pl_module, self.prompts[:1], self.print_at_end)
        pl_module.train()
        if trainer.is_global_zero:
            for number, text in enumerate(texts, 1):
                print(f"--- sample {number} ---\n{self.prompts[0]}{text}\n")
            print(next_steps(trainer), flush=True)

    def write(self, trainer: L.Trainer, module: LitGPT, prompts: list[str], num_samples: int) -> list[list[str]]:
        """The continuations of each prompt. Every rank takes part: sharded weights are gathered by all."""
        generation_config = dataclasses.replace(self.generation_config, num_samples=num_samples)
        ids = [encode_prompt(module.tokenizer, prompt) for prompt in prompts]
        # A compiled model would be compiled again for every length of text.
        with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            engine = Engine(module.model, module.config, module.tokenizer, max_slots=max(1, len(ids) * num_samples))
            texts = dict(complete(engine, ids, generation_config))
        return [[completion.text for completion in texts[place]] for place in range(len(ids))]


def next_steps(trainer: L.Trainer) -> str:
    """Three commands to go on with, for the run that has just ended."""
    best = next((_path(c) for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), "") or "last"
    return (
        "Try next:\n"
        f'  lit_gpt predict --ckpt_path {_short(best)} --start "def " --num_samples 3\n'
        f"  tensorboard --logdir {_short(_log_root(trainer))}\n"
        "  lit_gpt fit --config configs/quickstart.yaml --data.path data/mine --data.source YOUR_TEXT.txt"
    )


# Endings -------------------------------------------------------------------------------------------------------------


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


class NonFiniteStop(Callback):
    """Stops a run whose loss is no longer a number, and keeps it from overwriting its last good checkpoint.

    Each loss is looked at on the device; the host asks only when something is logged, validated or saved.
    """

    def __init__(self) -> None:
        self._places: list[tuple[int, int, int]] = []  # (step, epoch, batch) of the micro-batches since the last look
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether this micro-batch's loss is a number; look when it is time to."""
        assert isinstance(pl_module, LitGPT)
        loss = outputs["loss"].detach()
        if self._first_bad is None:
            self._first_bad = torch.full((), torch.iinfo(torch.int64).max, device=loss.device)
        here = torch.where(loss.isfinite(), self._first_bad, len(self._places))
        self._first_bad = torch.minimum(self._first_bad, here)
        self._places.append((trainer.global_step, trainer.current_epoch, batch_idx))
        if pl_module.logs_now:
            self._look(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look before time is spent on validation."""
        self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before a good checkpoint is overwritten."""
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        if self._first_bad is None:
            return
        first = int(trainer.strategy.reduce(self._first_bad, reduce_op="min"))
        places, self._places, self._first_bad = self._places, [], None
        if first >= len(places):
            return
        for callback in trainer.checkpoint_callbacks:
            callback.save_on_exception = False  # type: ignore[attr-defined]
        step, epoch, batch = places[first]
        raise NonFiniteLoss(
            f"the loss is not finite at step {step}, epoch {epoch}, batch {batch} of the data; "
            f"{_good_checkpoint(trainer)} and a lower learning rate or gradient_clip_val may get past it"
        )


class Endings(Callback):
    """Tells where to look when a run starts, and ends one that was told to stop with the status it should have."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how large the model is and how to open TensorBoard; put train and validation loss on one chart."""
        if trainer.is_global_zero:
            note(f"model: {sum(parameter.numel() for parameter in pl_module.parameters()):,} parameters")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                chart = {"loss": {"train and val": ["Multiline", ["train/loss", "val/loss"]]}}
                logger.experiment.add_custom_scalars(chart)
                where = _short(_log_root(trainer))
                note(f"curves: tensorboard --logdir {where}, then open http://localhost:6006 (run {logger.version})")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM over. Lightning's handler communicates inside the signal, which can lock the ranks up, and
        stops between two micro-batches of one step, whose gradient is then lost."""
        self._asked_to_stop = False

        def ask(number: int, frame: Any) -> None:
            launcher = trainer.strategy.launcher
            if launcher is not None and not self._asked_to_stop:
                launcher.kill(number)  # the processes that this one has started
            self._asked_to_stop = True

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ask)  # Lightning puts back what was there before the run

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each optimizer step the ranks agree on whether one of them was told to stop."""
        assert isinstance(pl_module, LitGPT)
        if not pl_module.stepped:
            return
        asked = self._asked_to_stop
        if trainer.world_size > 1:
            flag = torch.tensor(int(asked), device=pl_module.device)
            asked = bool(trainer.strategy.reduce(flag, reduce_op="max"))
        trainer._signal_connector.received_sigterm = asked  # Lightning ends the run with this batch

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the hyperparameters with the final figures, TensorBoard's table of runs."""
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and figures:
                final = {f"final/{name.removeprefix('val/')}": value for name, value in figures.items()}
                logger.log_hyperparams(dict(pl_module.hparams), final)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exit with 143 after SIGTERM: whoever sent it must see that the run has not come to its end.

        Processes that rank 0 has started leave with 0: Lightning's watcher kills rank 0 when one of them fails.
        """
        if isinstance(exception, SIGTERMException):
            exception.code = 0 if trainer.strategy.launcher is not None and trainer.local_rank > 0 else 143


def _good_checkpoint(trainer: L.Trainer) -> str:
    found = [Path(_path(c)) for c in trainer.checkpoint_callbacks if _path(c) and Path(_path(c)).exists()]
    if not found:
        return "no checkpoint was written before it; a new run"
    return (
        f"the last good checkpoint is {_short(max(found, key=lambda path: path.stat().st_mtime_ns))}; to go on from it"
    )


def _path(callback: Callback) -> str:
    return getattr(callback, "best_model_path", "")


def _log_root(trainer: L.Trainer) -> str:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.root_dir
    return trainer.default_root_dir


def _short(path: str | Path) -> str:
    """The path as one would type it here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)
