"""The tables that `lit_gpt info` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lit_gpt.insight.info.describe import ModelInfo, TensorInfo
from lit_gpt.insight.info.memory import TrainingMemory


def print_info(info: ModelInfo) -> None:
    """Four tables: the shape, the tensors, training, serving."""
    console = Console(highlight=False)
    console.print(_shape(info))
    console.print(_tensors(info.tensors))
    console.print(_training(info))
    console.print(_serving(info))


def print_hardware(rows: dict[str, str]) -> None:
    """What `precision: auto` decides by."""
    table = Table("hardware", "", title="This machine", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _shape(info: ModelInfo) -> Table:
    config, settings = info.config, info.settings
    table = Table("what", "figure", title=info.source, title_justify="left")
    table.add_row("parameters", f"{info.total:,}")
    table.add_row("… without embeddings and head", f"{info.without_embeddings:,}")
    table.add_row("layers, heads (query / key-value), width", f"{config.n_layer}, {_heads(info)}, {config.n_embd}")
    table.add_row("context, vocabulary", f"{config.block_size:,}, {config.vocab_size:,}")
    table.add_row(
        f"FLOPs per token forward, at a context of {settings['context']:,}",
        engineering(info.flops["forward_per_token"]),
    )
    table.add_row("FLOPs per token in training", engineering(info.flops["training_per_token"]))
    return table


def _heads(info: ModelInfo) -> str:
    return f"{info.config.n_head} / {info.config.kv_heads}"


def _tensors(tensors: list[TensorInfo]) -> Table:
    table = Table("tensor", "shape", title="Tensors", title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("dtype")
    for tensor in tensors:
        count = f"{tensor.count:,}" if tensor.shared_with is None else f"is {tensor.shared_with}"
        table.add_row(tensor.name, " × ".join(map(str, tensor.shape)), count, tensor.dtype)
    return table


def _training(info: ModelInfo) -> Table:
    settings, memory = info.settings, info.training
    extras = [f"batch {settings['batch_size']} × {settings['context']:,}", settings["precision"], settings["optimizer"]]
    if settings["accumulate_grad_batches"] > 1:
        extras.append(f"accumulating {settings['accumulate_grad_batches']}")
    if settings["activation_checkpointing"]:
        extras.append("activation checkpointing")
    table = Table("memory", title=f"Training: {', '.join(extras)}", title_justify="left")
    table.add_column("size", justify="right")
    for label, value in _parts(memory).items():
        table.add_row(label, binary(value))
    table.add_section()
    table.add_row("peak (gradients grow while activations shrink)", binary(memory.peak))
    return table


def _parts(memory: TrainingMemory) -> dict[str, int]:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "autocast's copies of weights": memory.weight_casts,
        "short-lived": memory.workspace,
    }
    return {label: value for label, value in parts.items() if value}


def _serving(info: ModelInfo) -> Table:
    table = Table("precision", title="Serving", title_justify="left")
    for column in ("weights", "cache per token", f"cache per slot of {info.config.block_size:,} tokens"):
        table.add_column(column, justify="right")
    for name, figures in info.serving.items():
        table.add_row(name, *(binary(value) for value in figures.values()))
    return table


def binary(size: float) -> str:
    """Bytes in the unit that suits them.

    >>> binary(36_864), binary(5_000_000_000)
    ('36.0 KiB', '4.66 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{_three(size)} {unit}"
        size /= 1024
    return f"{_three(size)} TiB"


def engineering(value: float) -> str:
    """A large number with its prefix.

    >>> engineering(291_000_000)
    '291 M'
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{_three(value)} {prefix}".strip()
        value /= 1000
    return f"{_three(value)} E"


def _three(value: float) -> str:
    """Three significant digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
