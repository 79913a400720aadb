"""The tables that `lit_gpt info` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lit_gpt.insight.info.describe import ModelInfo, Subject, TensorInfo
from lit_gpt.insight.info.memory import TrainingMemory
from lit_gpt.insight.info.parts import CountedPart, PartCount
from lit_gpt.insight.info.shapes import ShapeStep


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


def print_parts(info: ModelInfo, count: PartCount) -> None:
    """The count by part, with its sums."""
    table = Table("part", "sum", title=f"{info.source}: parameters by part", title_justify="left")
    table.add_column("parameters", justify="right")

    def add(part: CountedPart) -> None:
        table.add_row(part.name, part.sum, f"{part.count:,}")

    for part in count.before:
        add(part)
    table.add_section()
    for part in count.block:
        add(part)
    together = " + ".join(f"{part.count:,}" for part in count.block)
    table.add_row("a block", together, f"{count.per_block:,}")
    table.add_row("all blocks", f"{count.n_layer} × {count.per_block:,}", f"{count.n_layer * count.per_block:,}")
    table.add_section()
    for part in count.after:
        add(part)
    table.add_section()
    terms = [*(part.count for part in count.before), count.n_layer * count.per_block]
    terms += [part.count for part in count.after]
    table.add_row("total", " + ".join(f"{term:,}" for term in terms), f"{count.total:,}")
    console = Console(highlight=False)
    console.print(table)
    console.print(_about_the_head(count), soft_wrap=True)


def _about_the_head(count: PartCount) -> str:
    """What tying the head to the embedding does to the count."""
    if count.tied:
        untied = f"{count.total:,} + {count.tied:,} = {count.total + count.tied:,}"
        return f"The head is the token embedding (tied), counted once. With a head of its own: {untied}."
    embedding = count.before[0].count
    tied = f"{count.total:,} − {embedding:,} = {count.total - embedding:,}"
    return f"The head has weights of its own (untied). With the token embedding as its weights: {tied}."


def print_shapes(info: ModelInfo, steps: list[ShapeStep]) -> None:
    """The way of a batch through the model; blocks after the first, which are like it, in one row."""
    table = Table("layer", "kind", "in", "out", title=f"{info.source}: shapes", title_justify="left")
    last = info.config.n_layer - 1
    for step in steps:
        if step.name.startswith("h.") and not step.name.startswith("h.0"):
            if step.name == f"h.{last}":
                table.add_row(f"h.1 … h.{last}" if last > 1 else "h.1", "likewise", axes(step.before), axes(step.after))
            continue
        table.add_row(step.name, step.kind, axes(step.before), axes(step.after))
    Console(highlight=False).print(table)


def axes(shape: tuple[int, ...]) -> str:
    """A shape, as `(2, 4, 50,257)`."""
    return "(" + ", ".join(f"{count:,}" for count in shape) + ")"


def print_source_tensors(subject: Subject) -> None:
    """The tensors of another project's file under its own names."""
    table = Table("tensor", "shape", title=f"{subject.source}: its own names", title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("here")
    for tensor in subject.tensors:
        table.add_row(tensor.name, str(list(tensor.shape)), f"{tensor.count:,}", tensor.ours)
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
