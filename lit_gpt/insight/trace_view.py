"""Views of the traces of `predict`: tables in the terminal, JSON lines, a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from lit_gpt.data.prompts import PromptRecord
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.generation.complete import Completion, encode_prompt
from lit_gpt.generation.trace import Candidate, Trace, Tracer, traces
from lit_gpt.insight.trace_table import to_table
from lit_gpt.tokenizer.printable import named_bytes, show_end
from lit_gpt.tokenizer.tokenizer import Tokenizer


class TraceWriter(BasePredictionWriter):
    """Shows and writes the traces of what `predict` continues, in the order of the prompts."""

    def __init__(
        self, tracer: Tracer, tokenizer: Tokenizer | None, show: bool, output: str | None, html: str | None
    ) -> None:
        """A writer of what `tracer` records.

        Args:
            tracer: the observer of the engine.
            tokenizer: of the model; None for bare ids.
            show: print tables.
            output: a JSONL file, a line for each prompt and each token.
            html: a page.
        """
        super().__init__("batch")
        self._tracer = tracer
        self._tokenizer = tokenizer
        self._show = show
        self._output = output
        self._html = html
        self._traces: list[Trace] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse several devices. Raises UserError."""
        if trainer.world_size > 1:
            raise UserError(f"a trace is written by one device, not by {trainer.world_size}: use --trainer.devices 1")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: list[tuple[PromptRecord, list[Completion]]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Collect the traces of the prompts that are finished. `batch` is Lightning's: of any type, and unused."""
        for record, completions in prediction:
            ids = encode_prompt(self._tokenizer, record.prompt, record.ids)
            self._traces += traces(self._tracer, record.position, self._readable(record, ids), ids, completions)

    def _readable(self, record: PromptRecord, ids: Sequence[int]) -> bytes:
        """A prompt as text in UTF-8; a conversation with all that stands around its messages."""
        if isinstance(record.prompt, str) and record.ids is None:
            return record.prompt.encode("utf-8", "replace")
        if self._tokenizer is None:
            return str(list(ids)).encode()
        return b"".join(named_bytes(self._tokenizer, token) for token in ids)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and show them."""
        self._traces.sort(key=lambda trace: (trace.prompt_index, trace.sample))
        if self._output is not None:
            with atomic_write(self._output, "w") as file:
                file.writelines(to_lines(self._traces, self._tokenizer))
        if self._html is not None:
            with atomic_write(self._html, "w") as file:
                file.write(to_html(self._traces, self._tokenizer))
        if self._show:
            console = Console(highlight=False)
            for trace in self._traces:
                console.print(to_table(trace, self._tokenizer))


def to_lines(found: Sequence[Trace], tokenizer: Tokenizer | None) -> Iterator[str]:
    """Lines of JSON: for each continuation one with its initial prompt, then one for each decision.

    Each decision has the `sequence` that it continues as text, half a character as its bytes, and the shape of that
    sequence's tensor, (1, T).
    """
    for trace in found:
        head = {"prompt": trace.prompt_index, "sample": trace.sample}
        start = {"initial_prompt": _text(trace.prompt), "ids": trace.prompt_ids, "shape": trace.prompt_shape}
        yield _line({**head, **start})
        for step, text in zip(trace.steps, trace.sequences(tokenizer)):
            length = len(trace.prompt_ids) + step.position
            before = {"sequence": _text(text), "shape": (1, length)}
            yield _line({**head, **before, **step.to_dict()})


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


_SHOWN = 60  # characters of the sequence so far on a token's card


def to_html(found: Sequence[Trace], tokenizer: Tokenizer | None = None) -> str:
    """One HTML page with all scripts and data in it: it makes no request."""
    values = [
        {
            "prompt_index": trace.prompt_index,
            "sample": trace.sample,
            "prompt": _text(trace.prompt),
            "ids": trace.prompt_ids,
            "steps": [
                {**step.to_dict(), **_written(step.chosen, tokenizer), "sequence": show_end(text, _SHOWN)}
                for step, text in zip(trace.steps, trace.sequences(tokenizer))
            ],
        }
        for trace in found
    ]
    # "<" can end the script element or open a comment in it; JSON may write it as an escape anywhere.
    data = json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")
    page = files("lit_gpt.insight").joinpath("trace.html").read_text("utf-8")
    return page.replace("__DATA__", data)


def _written(token: Candidate, tokenizer: Tokenizer | None) -> dict[str, str | bool]:
    """The token's own text if its bytes are whole printable characters, else escaped."""
    data = b"" if tokenizer is None else tokenizer.token_bytes(token.id)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return {"text": token.piece, "whole": False}
    plain = bool(text) and all(character.isprintable() or character in "\n\t" for character in text)
    return {"text": text if plain else token.piece, "whole": plain}
