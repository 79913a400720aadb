"""LitGPT, the LightningModule: how a GPT is trained, validated, sampled and checkpointed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_gpt.batch import Batch, PairBatch
from lit_gpt.checkpoint.format import KEY, check_weights, header_entry
from lit_gpt.data.prompts import PromptRecord
from lit_gpt.data.resume import align_progress
from lit_gpt.data.task_batches import TaskBatch
from lit_gpt.generation.engine import Draft
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.sampling import Observer
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.lora import LoRAConfig, NamedAdapters
from lit_gpt.model.uninitialized import NoInitialization
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.adapter import AdapterTraining
from lit_gpt.train.answers import answer_step_figures, learns_answers, learns_pairs, token_loss
from lit_gpt.train.budget import Budget, budget_of
from lit_gpt.train.compile import compile_in_place
from lit_gpt.train.dpo import DPOConfig, pair_loss, pair_step_figures
from lit_gpt.train.frozen_base import BasePrecision
from lit_gpt.train.fsdp import shard
from lit_gpt.train.lightning_fixes import (
    RepeatedValidation,
    begin_next_epoch,
    clip_module_gradients,
    log_scalars,
    reopen_unfinished_epoch,
    repeat_unfinished_validation,
    total_steps,
)
from lit_gpt.train.optim import OptimizerConfig, make_optimizer, skip_step_where
from lit_gpt.train.precision import muon_arithmetic
from lit_gpt.train.prediction import Finished, Predictions, prediction_engine
from lit_gpt.train.schedule import ScheduleConfig
from lit_gpt.train.validation_metrics import ValidationMetrics


class LitGPT(L.LightningModule):
    """A GPT in training.

    Attributes:
        model: the GPT; built in `configure_model`, None before.
        metrics: what a validation or a test counts.
        tokenizer: what the ids mean; set it before `fit`, a checkpoint restores it. None for bare ids.
        initial_weights: tensors by the names of `GPT.state_dict` to start from instead of random ones.
        weights_follow: whether the Trainer loads a checkpoint before anything is computed, so that no random weights
            need be drawn.
        precision_reason: why the run has the precision that it has, for the checkpoint.
        stepped: whether the micro-batch that has just been made ended an optimizer step.
        skipped: whether the last optimizer step was skipped because its gradient was not finite: () bool on the device.
        budget: of the run's time, if it has one; the learning rate follows it.
        seed: of dropout; the run's `seed_everything`, kept over a resume.
        generation_config: how `predict` continues its prompts.
        observer: told of every token that `predict` decides on, if not None.
        inference_precision: of the weights in `predict`: `auto`, `fp32`, `bf16`, `int8` or `int4`.
        draft: what proposes tokens in speculative decoding, where it is a checkpoint.
        named_adapters: those that `predict` has over the model; prompts that name none get the first.
        validation: the figures of the run's latest validation, and the `step` that it was made after; for checkpoints.
        adapter: what is trained with LoRA; None where the model itself is.
    """

    model: GPT
    tokenizer: Tokenizer | None = None
    initial_weights: dict[str, Tensor] | None = None
    weights_follow: bool = False
    precision_reason: str = "as asked for"
    stepped: bool = False
    skipped: Tensor | None = None
    budget: Budget | None = None
    generation_config: GenerationConfig = GenerationConfig()
    observer: Observer | None = None
    inference_precision: str = "auto"
    draft: Draft | None = None
    named_adapters: NamedAdapters | None = None
    validation: dict[str, float] | None = None
    _predictions: Predictions | None = None
    _step_loss: Tensor | None = None
    _step_sums: Tensor | None = None
    _gradient_norm: Tensor | None = None
    _resumed_in_validation_at: int | None = None  # optimizer steps
    _repeated_validation: RepeatedValidation | None = None

    def __init__(
        self,
        config: GPTConfig = GPTConfig(),  # noqa: B008 (frozen)
        preset: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        compile: Literal["auto"] | bool = "auto",
        activation_checkpointing: bool = False,
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008
        base_precision: BasePrecision = "auto",
        dpo: DPOConfig = DPOConfig(),  # noqa: B008
    ) -> None:
        """A module without weights yet: they are made when the Trainer knows on which devices they belong.

        Args:
            config: the model's shape.
            preset: a named shape, used where `config` is left at its default.
            optimizer: AdamW or Muon, and their rates.
            schedule: warm-up and decay of the learning rate.
            compile: `torch.compile` the model; `auto` does so on a GPU, and on a CPU the program times it where the run
                is long enough to earn it back.
            activation_checkpointing: keep one activation per block and compute the rest again, a third more work.
            lora: with a rank above 0 the model stays as it is, and low-rank terms beside its layers are trained.
            base_precision: with LoRA, of the frozen layers; `auto` is the smaller of fp32 and bf16 that is no slower.
            dpo: of training on pairs of answers, which `data.format: pairs` is.
        """
        super().__init__()
        if preset is not None and config == GPTConfig():
            config = GPTConfig.from_preset(preset)
        self.config = config
        self.optimizer_config, self.schedule_config, self.dpo_config = optimizer, schedule, dpo
        self.compile_model = compile
        self.activation_checkpointing = activation_checkpointing
        self.adapter = AdapterTraining.of(lora, base_precision)
        self.strict_loading = self.adapter is None  # an adapter's checkpoint has not the base
        self.model = None  # type: ignore[assignment]
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.metrics = ValidationMetrics(dpo)
        self._micro_losses: list[Tensor] = []
        self._micro_sums: list[Tensor] = []  # of each: the targets that count, or the sums that `pair_loss` returns
        # Plain values: a dataclass in a checkpoint could not be read without running code.
        self.save_hyperparameters({
            "config": config.to_dict(),
            "preset": preset,
            "optimizer": dataclasses.asdict(optimizer),
            "schedule": dataclasses.asdict(schedule),
            "compile": compile,
            "activation_checkpointing": activation_checkpointing,
            "lora": dataclasses.asdict(lora),
            "base_precision": base_precision,
            "dpo": dataclasses.asdict(dpo),
        })  # fmt: skip

    # Building ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the GPT, once; shard it over the device mesh where the strategy has one."""
        if self.model is not None:
            return
        self.model = self._build()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh, str(self.trainer.precision), self._compiles())
        elif self._compiles():
            compile_in_place(self.model, self.trainer.strategy.root_device.type)

    def _build(self) -> GPT:
        weights, self.initial_weights = self.initial_weights, None
        if self.adapter is not None:
            precision = None if self.trainer.state.fn == "predict" else str(self.trainer.precision)
            return self.adapter.build(self.config, weights, precision, self.activation_checkpointing, self.device_mesh)
        with NoInitialization() if self.weights_follow else nullcontext():
            model = GPT(self.config)
        if weights is not None:
            check_weights(model, weights, "initial_weights")
            model.load_state_dict(weights)
        model.activation_checkpointing = self.activation_checkpointing
        return model

    def _compiles(self) -> bool:
        if self.trainer.state.fn != "fit":  # one pass, or decoding, which has a form of its own
            return False
        if self.compile_model == "auto":
            return self.trainer.strategy.root_device.type == "cuda"
        return self.compile_model

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and its schedule, stepped once per optimizer step."""
        # Rank 0's arithmetic, or ranks of different kinds would move their copies of the weights apart.
        arithmetic = self.trainer.strategy.broadcast(muon_arithmetic(self.trainer.strategy.root_device.type))
        optimizer = make_optimizer(self.model, self.optimizer_config, not self._has_scaler, arithmetic)
        scheduler = LambdaLR(optimizer, self._learning_rate_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self) -> Callable[[int], float]:
        """The factor on the peak rates: of the number of steps done, or of the share of the budget that is spent."""
        steps, self.budget = total_steps(self.trainer), budget_of(self.trainer)
        if self.budget is None:
            return self.schedule_config.factor(steps)
        self.budget.max_steps, budget = steps, self.budget
        factor = self.schedule_config.factor_of_share(steps)
        return lambda step: factor(budget.share)

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """The rates of the next step, after the clock of the budget has been read."""
        if self.budget is not None:
            self.budget.advance(self.trainer)
        super().lr_scheduler_step(scheduler, metric)

    @property
    def _has_scaler(self) -> bool:
        """Whether a gradient scaler is at work, which skips steps by itself."""
        return str(self.trainer.precision) == "16-mixed"

    # Training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch | PairBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of one micro-batch, or the mean loss of its pairs."""
        if self.config.dropout > 0 or (self.adapter and self.adapter.lora.dropout > 0):
            torch.manual_seed(self._dropout_seed(batch_idx))
        if isinstance(batch, PairBatch):
            loss, sums = pair_loss(self.model, batch, self.dpo_config)
        else:
            loss, sums = token_loss(self.model, batch)
        self._micro_losses.append(loss.detach())
        self._micro_sums.append(sums)
        return loss

    def _dropout_seed(self, batch_idx: int) -> int:
        """A pure function of the position in the run: a resumed run drops what the uninterrupted one would have."""
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        position = f"{self.seed} {self.global_step} {micro_step} {self.global_rank}"
        return int.from_bytes(hashlib.sha256(position.encode()).digest()[:8], "little", signed=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, keep the mean loss and the gradient norm for the log, and skip the step if that norm is not finite."""
        self._step_loss = torch.stack(self._micro_losses).mean()
        self._step_sums = torch.stack(self._micro_sums).sum(0)
        self._micro_losses.clear()
        self._micro_sums.clear()
        self.stepped = True
        self._gradient_norm = clip_module_gradients(self.parameters(), gradient_clip_val, gradient_clip_algorithm)
        self.skipped = ~self._gradient_norm.isfinite()
        if not self._has_scaler:
            skip_step_where(self.skipped, optimizer)

    @property
    def logs_now(self) -> bool:
        """Whether an optimizer step has just been made that is one to log."""
        is_last = self.budget is not None and self.budget.share >= 1
        return self.stepped and (is_last or self.global_step % self._log_interval == 0)

    @property
    def _log_interval(self) -> int:
        """Optimizer steps between two entries of the log."""
        return self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        """No optimizer step yet; -1, which ends the epoch, if all are made already."""
        self.stepped = False
        self._end_repeated_validation()  # it had no batch
        return -1 if 0 <= self.trainer.max_steps <= self.global_step else None

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the step that has just been made, if it is one to log. In between nothing waits for the device."""
        if not self.logs_now:
            return
        loss = self.trainer.strategy.reduce(self._step_loss, reduce_op="mean")
        self.log("train/loss", loss, prog_bar=True, logger=False)
        rates = {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizers[0].param_groups}
        if self.budget is not None:
            self.log("budget/share", self.budget.share, prog_bar=True, logger=False)
            rates["budget/share"] = self.budget.share
        if learns_answers(self.trainer):
            sums = self.trainer.strategy.reduce(self._step_sums, reduce_op="sum")
            of_pairs = learns_pairs(self.trainer)
            rates |= pair_step_figures(sums) if of_pairs else answer_step_figures(sums, batch, self.trainer)
        log_scalars(self, {"train/loss": loss, "train/gradient_norm": self._gradient_norm, **rates})

    # Validation and test -----------------------------------------------------------------------------------------

    @property
    def repeats_validation(self) -> bool:
        """Whether a resumed run is about to repeat the validation that it was stopped in, before any step."""
        return self._repeated_validation is not None

    def on_fit_start(self) -> None:
        """Begin with the validation that was not finished, if there is one."""
        step, self._resumed_in_validation_at = self._resumed_in_validation_at, None
        repeats = step is not None and self.trainer.enable_validation
        self._repeated_validation = RepeatedValidation(self.trainer, step) if repeats else None  # type: ignore[arg-type]

    def on_validation_start(self) -> None:
        """The batches of a validation that is repeated count once."""
        if self._repeated_validation is not None and not self.trainer.sanity_checking:
            self._repeated_validation.begin()

    def on_validation_end(self) -> None:
        """That validation, if it was to be repeated, is done."""
        if not self.trainer.sanity_checking:
            self._end_repeated_validation()

    def _end_repeated_validation(self) -> None:
        if self._repeated_validation is not None:
            self._repeated_validation.end()
            self._repeated_validation = None

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self._start_counting()

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self._start_counting()

    def validation_step(self, batch: Batch | PairBatch | TaskBatch, batch_idx: int) -> None:
        """Count one batch."""
        self._count(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/bits_per_byte` and those of answers over all batches of all ranks."""
        figures = self._log_metric("val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.validation = {"step": self.global_step, **{name: float(value) for name, value in figures.items()}}

    def on_test_epoch_end(self) -> None:
        """Log the same figures for the test set."""
        self._log_metric("test")

    def _start_counting(self) -> None:
        self.metrics.start(self.tokenizer, self.config.vocab_size, self.device)

    def _count(self, batch: Batch | PairBatch | TaskBatch) -> None:
        self.metrics.count(self.model, batch, learns_answers(self.trainer))

    def _log_metric(self, stage: str) -> dict[str, Tensor]:
        figures = self.metrics.compute(learns_pairs(self.trainer))
        self.log_dict({f"{stage}/{name}": value for name, value in figures.items()}, prog_bar=stage == "val")
        if self.trainer.training or self.trainer.state.fn == "fit":
            self.log("step", float(self.global_step))  # the logger's x-axis: optimizer steps done
        return figures

    # Prediction --------------------------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        """Turn the model into its fastest form, and set up the engine."""
        options = self.inference_precision, self.device, self.draft, self.named_adapters
        engine = prediction_engine(self.model, self.tokenizer, *options)
        engine.observer = self.observer
        self._predictions = Predictions(engine, self.generation_config, self.named_adapters)

    def predict_step(self, batch: list[PromptRecord], batch_idx: int) -> Finished:
        """Continue prompts; those that are finished by now, which may be of earlier batches."""
        assert self._predictions is not None
        return self._predictions.step(batch, is_last=batch_idx + 1 == self.trainer.num_predict_batches[0])

    def on_predict_end(self) -> None:
        """Free the cache's memory."""
        self._predictions = None

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint complete: shape, tokenizer, precision, seed, and the latest figures."""
        entry = header_entry(self.config, self.tokenizer, str(self.trainer.precision))
        about_run = {"seed": self.seed, "precision_reason": self.precision_reason, "validation": self.validation}
        checkpoint[KEY] = {**checkpoint.get(KEY, {}), **entry, **about_run}  # a callback has put sample prompts there
        if self.adapter is not None:
            self.adapter.save(self.model, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore tokenizer, seed, figures and Lightning's progress from a checkpoint."""
        entry = checkpoint[KEY]
        if self.adapter is not None:
            self.adapter.check(self.model, checkpoint)
        self.validation = entry.get("validation")
        self.seed = entry.get("seed", self.seed)
        self.precision_reason = entry.get("precision_reason", self.precision_reason)
        if entry["tokenizer"] is not None and self.named_adapters is None:  # which may have brought another
            self.tokenizer = Tokenizer.from_dict(entry["tokenizer"])
        align_progress(checkpoint, self.trainer.accumulate_grad_batches)
        if "loops" in checkpoint:
            begin_next_epoch(checkpoint["loops"]["fit_loop"])
            if self.trainer.max_steps < 0:
                reopen_unfinished_epoch(checkpoint["loops"]["fit_loop"])
            unfinished = repeat_unfinished_validation(checkpoint["loops"]["fit_loop"])
            self._resumed_in_validation_at = checkpoint["global_step"] if unfinished else None
