"""Tensors, memory and FLOPs of a model, from its configuration on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_gpt.insight.info.memory import TrainingMemory, TrainingStep, check_precision, training_memory
from lit_gpt.insight.info.source_names import SourceTensor
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.model.uninitialized import empty_gpt
from lit_gpt.train.precision import device_type, resolve_precision

_EMBEDDINGS = ("wte.weight", "wpe.weight", "lm_head.weight")


@dataclass(frozen=True)
class Subject:
    """What is described.

    Attributes:
        source: where it comes from.
        config: its shape.
        training: how it is trained, where that is known.
        dtypes: those of the tensors in its file, by name.
        tensors: of that file under its own names, where it is another project's.
    """

    source: str
    config: GPTConfig
    training: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    tensors: list[SourceTensor] = field(default_factory=list)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shared_with` names the one that it is the same as, and it is then not counted again."""

    name: str
    shape: tuple[int, ...]
    count: int
    dtype: str
    shared_with: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Everything that `lit_gpt info` says of one model. Sizes in bytes, FLOPs as `GPTConfig.forward_flops_per_token`.

    Attributes:
        source: where it comes from.
        config: its shape.
        tensors: all of them, in the order of `GPT.state_dict`.
        settings: batch, context, precision and optimizer that `training` is for.
        training: memory of a training step.
        serving: weights and cache by dtype.
        flops: per token and per training step at the context in `settings`.
    """

    source: str
    config: GPTConfig
    tensors: list[TensorInfo]
    settings: dict[str, Any]
    training: TrainingMemory
    serving: dict[str, dict[str, int]]
    flops: dict[str, float]

    @property
    def total(self) -> int:
        """Parameters, shared ones once."""
        return sum(tensor.count for tensor in self.tensors if tensor.shared_with is None)

    @property
    def without_embeddings(self) -> int:
        """Parameters in the blocks and the last norm: neither embedding, nor positions, nor head."""
        outside = sum(
            tensor.count for tensor in self.tensors if tensor.name in _EMBEDDINGS and tensor.shared_with is None
        )
        return self.total - outside

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--format json` prints them; `Any`, since JSON nests."""
        return {
            "source": self.source,
            "config": self.config.to_dict(),
            "parameters": {"total": self.total, "without_embeddings": self.without_embeddings},
            "flops": self.flops,
            "training": {**self.settings, "memory": self.training.to_dict()},
            "serving": self.serving,
            "tensors": [vars(tensor) for tensor in self.tensors],
        }


def tensors_of(config: GPTConfig, dtypes: dict[str, str] | None = None) -> list[TensorInfo]:
    """Every tensor of the model, which is built without memory, whatever its size."""
    model = empty_gpt(config)
    first: dict[int, str] = {}
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        dtype = (dtypes or {}).get(name, dtype_name(parameter))
        shared = None if owner == name else owner
        rows.append(TensorInfo(name, tuple(parameter.shape), parameter.numel(), dtype, shared))
    return rows


def dtype_name(tensor: Tensor) -> str:
    """The dtype without `torch.`: float32."""
    return str(tensor.dtype).removeprefix("torch.")


def describe(subject: Subject, **settings: Any) -> ModelInfo:
    """Count and estimate.

    Args:
        subject: what to describe.
        settings: the fields of `TrainingStep`, hence of several types; those that are None come from the subject, then
            from the defaults.

    Raises:
        UserError: for a setting out of range.
    """
    config = subject.config
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = {**_DEFAULTS, "context": config.block_size, **subject.training, **given}
    chosen["precision"] = _precision(str(chosen["precision"]), config)
    tensors = tensors_of(config, subject.dtypes)
    own = [tensor for tensor in tensors if tensor.shared_with is None]
    total = sum(tensor.count for tensor in own)
    matrices = sum(tensor.count for tensor in own if tensor.name.startswith("h.") and len(tensor.shape) == 2)
    memory = training_memory(config, total, matrices, TrainingStep(**chosen), device_type())
    forward = config.forward_flops_per_token(chosen["context"])
    flops = {
        "forward_per_token": forward,
        "training_per_token": 3 * forward,
        "training_per_micro_batch": 3 * forward * chosen["batch_size"] * chosen["context"],
    }
    return ModelInfo(subject.source, config, tensors, chosen, memory, _serving(config, total), flops)


_DEFAULTS: dict[str, Any] = {
    "batch_size": 8,
    "precision": "auto",
    "optimizer": "adamw",
    "accumulate_grad_batches": 1,
    "activation_checkpointing": False,
}


def _precision(requested: str, config: GPTConfig) -> str:
    """`auto` is not timed here, as `fit` does on a CPU that could do either: it stands for fp32 there."""
    if requested == "auto" and device_type() == "cpu":
        return "32-true"
    return check_precision(resolve_precision(requested, config, 1).precision)


def _serving(config: GPTConfig, total: int) -> dict[str, dict[str, int]]:
    """For each inference precision: weights, cache of one token, cache of one slot of `block_size` tokens."""
    products = config.matmul_weights()  # in int8 or int4; the rest stays fp32, a tied embedding beside the head's copy
    tied = config.n_embd * config.vocab_rows if config.tie_embeddings else 0
    rest = 4 * (total - products + tied)
    groups = products // 32  # of int4, with a scale of two bytes each
    weights = {"fp32": 4 * total, "bf16": 2 * total, "int8": products + rest, "int4": products // 2 + 2 * groups + rest}
    figures = {}
    for name, size in weights.items():
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        figures[name] = {
            "weights": size,
            "cache_per_token": KVCache.bytes_per_slot(config, 1, dtype),
            "cache_per_slot": KVCache.bytes_per_slot(config, config.block_size, dtype),
        }
    return figures
