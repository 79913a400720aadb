"""LoRA in training: the model over a frozen base, and what its checkpoints hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_gpt.checkpoint.adapter import AdapterEntry
from lit_gpt.checkpoint.format import KEY, build_model
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.lora import LoRAConfig, adapter_state, add_lora, merge_lora
from lit_gpt.model.token_rows import freeze_token_rows, train_token_rows
from lit_gpt.model.uninitialized import NoInitialization, empty_gpt
from lit_gpt.train.frozen_base import compact_base, resolve_base_precision
from lit_gpt.train.heap import return_freed_memory

_PREFIX = "model."


class AdapterTraining:
    """The part of a `LitGPT` that trains an adapter.

    Attributes:
        lora: rank and targets.
        base_precision: of the frozen layers: `auto`, `fp32`, `bf16` or `int8`.
        entry: of the checkpoint: which base it is; set before `fit`.
        new_tokens: ids that the base's tokenizer lacks, whose rows are trained as well.
    """

    def __init__(self, lora: LoRAConfig, base_precision: str) -> None:
        self.lora = lora
        self.base_precision = base_precision
        self.entry: AdapterEntry | None = None
        self.new_tokens = range(0)

    @classmethod
    def of(cls, lora: LoRAConfig, base_precision: str) -> AdapterTraining | None:
        """None for a rank of 0. Raises UserError for a precision of the base that then has no effect."""
        if lora.rank == 0 and base_precision != "auto":
            raise UserError(
                f"base_precision={base_precision} has no effect without lora.rank: set it, or leave this out"
            )
        return cls(lora, base_precision) if lora.rank else None

    def build(
        self,
        config: GPTConfig,
        weights: dict[str, Tensor] | None,
        precision: str | None,
        checkpointing: bool = False,
        mesh: object = None,
    ) -> GPT:
        """The model: its weights are `weights` themselves, without a copy, and frozen.

        Args:
            config: its shape.
            weights: of the base, by the names of `GPT.state_dict`, grown if the vocabulary has.
            precision: the Trainer's; None to merge base and terms afterwards.
            checkpointing: whether activations are checkpointed.
            mesh: over which the strategy shards models, which is refused; None for none.

        Raises:
            UserError: without a base, and for targets or a rank that do not fit it.
        """
        if mesh is not None:
            raise UserError("LoRA trains on one device, or on several with --trainer.strategy ddp: choose one of these")
        if weights is None:
            raise UserError(f"model.lora.rank={self.lora.rank} needs a base to adapt: name it with --init_from")
        return_freed_memory(config.n_embd, precision)
        model = build_model(config, weights, "the base").float().train()
        compact_base(model, "fp32" if precision is None else resolve_base_precision(self.base_precision, precision))
        add_lora(model, config, self.lora)
        if self.new_tokens:
            train_token_rows(model, self.new_tokens.start, len(self.new_tokens), config.tie_embeddings)
        model.activation_checkpointing = checkpointing
        for block in model.h:
            assert isinstance(block, Block)
            block.mlp.recomputes = not checkpointing
        return model

    def save(self, model: GPT, checkpoint: dict[str, Any]) -> None:
        """Leave in a checkpoint what is trained, and say which base that belongs to."""
        if self.entry is None:
            raise UserError("an adapter is saved with the address of its base: set adapter.entry first")
        checkpoint["state_dict"] = {_PREFIX + name: tensor for name, tensor in adapter_state(model).items()}
        checkpoint[KEY]["adapter"] = self.entry.to_dict()

    def check(self, model: GPT, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint with the model that it is to be loaded into.

        Raises:
            UserError: if it is of another base, or has other terms.
        """
        found = checkpoint[KEY].get("adapter")
        if found is None:
            raise UserError("the checkpoint is a whole model's, no adapter's: start from it with --init_from")
        entry = AdapterEntry.from_dict(found, "the checkpoint")
        if self.entry is not None:
            entry.check_base(self.entry.base_sha256, self.entry.base, "the checkpoint's adapter")
        wanted = {_PREFIX + name: tensor.shape for name, tensor in adapter_state(model).items()}
        shapes = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        if wanted != shapes:
            name = next(name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name))
            raise UserError(f"the checkpoint's adapter does not fit model.lora: they differ in {name[:80]}")


def merge(model: GPT) -> None:
    """Make a plain model of base and terms, in place."""
    merge_lora(model)
    freeze_token_rows(model)


def check_lora(config: GPTConfig, lora: LoRAConfig) -> None:
    """Refuse targets that match nothing in a model of that shape, and a rank above its widths. Raises UserError."""
    with NoInitialization():
        add_lora(empty_gpt(config), config, lora)
