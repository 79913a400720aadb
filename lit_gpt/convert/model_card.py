"""The model card of a published model: the README.md that the hub shows, with its metadata as YAML in front."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import yaml

from lit_gpt.checkpoint.training_record import TrainingRecord
from lit_gpt.convert.card_samples import SEED, TEMPERATURE, TOP_K
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.model.config import GPTConfig

_UNKNOWN = "not recorded"
_LONGEST = 200  # characters of a value that comes from a file


@dataclass(frozen=True)
class CardDetails:
    """What a card says besides what the checkpoint holds.

    Attributes:
        name: the repository, OWNER/NAME, or the folder.
        architecture: the class of transformers; None for a checkpoint that is loaded by lit_gpt alone.
        parameters: how many the model has.
        licence: its entries of the metadata; empty for none.
        languages: of the texts.
        samples: texts by the model.
    """

    name: str
    architecture: str | None
    parameters: int
    licence: Mapping[str, str] = field(default_factory=dict)
    languages: Sequence[str] = ()
    samples: Sequence[str] = ()


def model_card(source: SourceCheckpoint, details: CardDetails) -> str:
    """The whole file."""
    record = source.training or TrainingRecord()
    parts = [
        _metadata(record, details),
        f"# {_plain(details.name)}",
        _summary(source, details),
        _usage(source, details),
        _limits(source, record),
        _table("Data", _data(source, record)),
        _table("Training", _recipe(source.config, record)),
        _table("Validation", _figures(record)),
        _samples(details.samples),
        _licence(details.licence),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _metadata(record: TrainingRecord, details: CardDetails) -> str:
    """https://huggingface.co/docs/hub/model-cards#model-card-metadata"""
    found = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)", record.path or "")
    values = {
        **details.licence,
        "language": list(details.languages),
        "library_name": "transformers" if details.architecture else "lit_gpt",
        "pipeline_tag": "text-generation",
        "tags": ["lit_gpt"],
        "datasets": [found[1]] if found else [],
    }
    text = yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _summary(source: SourceCheckpoint, details: CardDetails) -> str:
    config, architecture = source.config, details.architecture
    kind = f"`{architecture}` of transformers" if architecture else "a GPT of lit_gpt"
    text = (
        f"A language model that continues text: {details.parameters:,} parameters, {kind} "
        f"with {config.n_layer} layers of width {config.n_embd}, {config.n_head} heads "
        f"({config.kv_heads} of keys and values), a context of {config.block_size:,} tokens and a vocabulary of "
        f"{config.vocab_size:,}."
    )
    if source.training is None:
        return f"{text} Converted by lit_gpt from a checkpoint in the format of {_plain(source.kind)}."
    return f"{text} Trained with lit_gpt."


def _usage(source: SourceCheckpoint, details: CardDetails) -> str:
    """How to load it. Without a tokenizer there are ids only."""
    name, prompt = _plain(details.name), json.dumps(_prompt(source, details.samples), ensure_ascii=False)
    count = max(1, min(50, source.config.block_size // 2))
    model = "model = AutoModelForCausalLM.from_pretrained(name)"
    written = f"model.generate(ids, max_new_tokens={count})[0]"
    if source.tokenizer is None:
        lines = ["import torch", "from transformers import AutoModelForCausalLM", "", f'name = "{name}"', model]
        lines += [f"ids = torch.tensor([{prompt}])", f"print({written}.tolist())"]
    else:
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", f'name = "{name}"']
        lines += ["tokenizer = AutoTokenizer.from_pretrained(name)", model]
        lines += [f'ids = tokenizer({prompt}, return_tensors="pt").input_ids', f"print(tokenizer.decode({written}))"]
    ours = ["import lit_gpt", "", f'print(lit_gpt.load("{name}").generate({prompt}, max_new_tokens={count}))']
    if details.architecture is None:
        return "## How to load it\n\n" + _fenced("\n".join(ours), "python")
    blocks = [_fenced("\n".join(code), "python") for code in (lines, ours)]
    return f"## How to load it\n\nWith transformers:\n\n{blocks[0]}\n\nWith lit_gpt:\n\n{blocks[1]}"


def _prompt(source: SourceCheckpoint, samples: Sequence[str]) -> str | list[int]:
    """A text that the model knows every token of; ids where there is no tokenizer."""
    config, tokenizer = source.config, source.tokenizer
    if tokenizer is None:
        return [1, 2, 3]
    for text in ("Once upon a time", "从前", *(_visible(sample).partition("\n")[0][:16] for sample in samples)):
        ids = tokenizer.encode(text)
        if ids and max(ids) < config.vocab_size and len(ids) <= config.block_size // 2:
            return text
    return "\n"


def _limits(source: SourceCheckpoint, record: TrainingRecord) -> str:
    """Plain words about what nobody should expect of it."""
    seen = f" on {record.tokens:,} tokens" if record.tokens else ""
    points = [
        f"It was trained{seen} to write what is likely to follow, not what is true. What it writes can be false, "
        "and it does not know when.",
        "It can repeat prejudice, insults and whole passages of its training text, private ones among them.",
        "Do not let it decide about people, and do not rely on it for advice on health, law or money.",
        f"It sees no more than {source.config.block_size:,} tokens at a time.",
    ]
    if source.tokenizer is None or source.tokenizer.chat_template is None:
        points.insert(2, "It continues a text; it was not trained to answer questions or to follow instructions.")
    return "## What it is not for\n\n" + "\n".join(f"- {point}" for point in points)


TableRows = Iterable[tuple[str, str | None]]


def _table(heading: str, rows: TableRows) -> str:
    lines = [f"| {name} | {_UNKNOWN if value is None else value} |" for name, value in rows]
    return "\n".join([f"## {heading}", "", "| | |", "|---|---|", *lines])


def _data(source: SourceCheckpoint, record: TrainingRecord) -> TableRows:
    tokenizer = source.tokenizer
    yield "text", _shown_address(record.source)
    yield "token shards", _shown_address(record.path)
    yield "fingerprint of the training tokens (SHA-256)", _code(record.fingerprint)
    yield "tokenizer", None if tokenizer is None else f"{_code(tokenizer.name)}, SHA-256 {_code(tokenizer.hash)}"


def _recipe(config: GPTConfig, record: TrainingRecord) -> TableRows:
    batch = None
    if record.rows is not None and record.row_tokens is not None:
        batch = f"{record.rows:,} rows of {record.row_tokens:,} tokens"
    yield "optimizer", _settings(record.optimizer)
    yield "learning rate schedule", _settings(record.schedule)
    yield "optimizer steps", _number(record.steps)
    yield "batch of a step", batch
    yield "tokens trained on", _number(record.tokens)
    yield "precision", _code(record.precision)
    yield "seed", None if record.seed is None else str(record.seed)
    yield "dropout", f"{config.dropout:g}" if record.steps else None


def _figures(record: TrainingRecord) -> TableRows:
    figures = record.validation
    loss, step = figures.get("loss"), figures.get("step")
    after = "" if step is None else f" after {step:,.0f} steps"
    if record.of_pairs:
        yield f"loss of pairs of answers{after} (DPO)", _figure(loss)
        yield f"pairs whose preferred answer has the larger reward{after}", _figure(figures.get("reward_accuracy"))
        return
    yield f"loss{after}, nats a token", _figure(loss)
    yield f"perplexity{after}", _figure(figures.get("perplexity"))
    yield f"bits per byte{after}", _figure(figures.get("bits_per_byte"))
    yield "lowest loss of the run, nats a token", _figure(record.best_loss)


def _samples(samples: Sequence[str]) -> str:
    if not samples:
        return ""
    how = f"at temperature {TEMPERATURE} among the {TOP_K} likeliest tokens, with seed {SEED}"
    blocks = "\n\n".join(_fenced(_visible(text), "text") for text in samples)
    return f"## Samples\n\nWritten by this model from nothing, {how}, and not chosen:\n\n{blocks}"


def _licence(licence: Mapping[str, str]) -> str:
    if not licence:
        return "## Licence\n\nNone was given: without one nobody else may use it. Ask its makers."
    name = licence.get("license_name", licence["license"])
    link = licence.get("license_link")
    return f"## Licence\n\n[{name}]({link})" if link else f"## Licence\n\n{name}"


# Values from files ---------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """A line of text without what Markdown or a quoted string would take for more than text."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"[\\`*\[\]<>|\"#!]", "_", " ".join(shown.split())[:_LONGEST])


def _code(text: str | None) -> str | None:
    return f"`{_plain(text)}`" if text else None


def _shown_address(address: str | None) -> str | None:
    """A web address without names and keys in it; of a path here only the last part, which is nobody else's concern."""
    if address is None:
        return None
    if "://" not in address:
        return _code(re.split(r"[/\\]", address.rstrip("/\\"))[-1])
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    return _code(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _settings(values: Mapping[str, object]) -> str | None:
    """`muon: lr=0.0006, weight_decay=0.1`."""
    plain = {name: value for name, value in values.items() if isinstance(value, (str, int, float))}
    if not plain:
        return None
    name = plain.pop("name", None)
    text = ", ".join(f"{key}={_shortest(value)}" for key, value in plain.items())
    return _code(": ".join(filter(None, [str(name) if name else "", text])))


def _shortest(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _figure(value: float | None) -> str | None:
    return None if value is None or not math.isfinite(value) else f"{value:.4f}"


def _visible(text: str) -> str:
    """What a code block can hold as it is: line ends, tabs and what is printable."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text).strip("\n")


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
