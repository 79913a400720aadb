"""Results of `predict`: as JSON lines to the file, or human-readable in the order of the input to stdout."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lit_gpt.cli.partial_results import PartialResults
from lit_gpt.console.messages import note
from lit_gpt.data.prompts import PromptRecord
from lit_gpt.generation.complete import Completion, encode_prompt
from lit_gpt.generation.outputs import Token
from lit_gpt.tokenizer.tokenizer import Tokenizer

Finished = list[tuple[PromptRecord, list[Completion]]]
"""What a `predict_step` returns: prompts that are finished, each with its continuations."""

_RULE = "-" * 15


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returns: to the file, or readable and in order to stdout. Shows progress on stderr.

    Attributes:
        failed: continuations of this rank that ended in an error.
    """

    def __init__(
        self,
        partial: PartialResults | None,
        total: int,
        tokenizer: Tokenizer | None = None,
        answers: bool = False,
        show_ids: bool = False,
    ) -> None:
        """A writer of `total` prompts' results; without `partial` to stdout.

        Args:
            partial: where to write them.
            total: how many prompts there are.
            tokenizer: for prompts of ids.
            answers: what is generated answers the prompt, and does not go on with it: it is printed below.
            show_ids: add the ids of each prompt and the shape of their tensor.
        """
        super().__init__("batch")
        self._partial = partial
        self._prints = partial is None
        self._total = total
        self._tokenizer = tokenizer
        self._between = "\n" if answers else ""
        self._show_ids = show_ids
        self._file: IO[bytes] | None = None
        self._early: dict[int, list[dict[str, Any]]] = {}  # finished, but not their turn to be printed
        self._next = 0
        self.failed = 0
        self._progress = Progress(
            TextColumn("prompts"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open what is needed. Several ranks that print do so through a file, which rank 0 reads out at the end."""
        if self._prints and trainer.world_size > 1:
            folder = tempfile.mkdtemp() if trainer.is_global_zero else ""
            self._partial = PartialResults(Path(trainer.strategy.broadcast(folder)) / "results.jsonl", "")
        if self._partial is not None:
            self._file = self._partial.append(trainer.global_rank)
        self._progress.disable = not trainer.is_global_zero or self._total == 1
        self._progress.start()
        self._task = self._progress.add_task("prompts", total=-(-self._total // trainer.world_size))

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Finished,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the prompts that are finished."""
        for prompt, completions in prediction:
            ids = encode_prompt(self._tokenizer, prompt.prompt, prompt.ids) if self._show_ids else None
            records = to_records(prompt, completions, ids)
            self.failed += sum(completion.error is not None for completion in completions)
            if self._file is None:
                self._early[prompt.position] = records
            else:
                self._file.write(b"".join(map(to_line, records)))
        if self._file is not None:
            self._file.flush()
        while self._next in self._early:
            self._print(self._early.pop(self._next))
            self._next += 1
        self._progress.update(self._task, advance=len(prediction))

    def _print(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if record["sample"] == 0 and "prompt_ids" in record:
                print(f"prompt ids {record['prompt_ids']}, shape {tuple(record['prompt_shape'])}")
            if "score" in record:
                print(f"score {record['score']:.4f}")
            text = record["text"] if self._tokenizer else f" {record['ids']}"
            print(self._readable(record["prompt"]) + self._between + text)
            if "error" in record:
                note(f"prompt {record['index'] + 1}: {record['error']}")
            if self._total > 1 or record["samples"] > 1:
                print(_RULE)
        sys.stdout.flush()

    def _readable(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return str(prompt) if self._tokenizer is None else self._tokenizer.decode(prompt)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All ranks are through: rank 0 puts the results together."""
        self._progress.stop()
        if self._file is None or self._partial is None:
            return
        self._file.close()
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero and self._prints:
            for line in self._partial.merged():
                self._print([json.loads(line)])
            shutil.rmtree(self._partial.output.parent)
        elif trainer.is_global_zero:
            self._partial.finish()
            self._partial.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was; what is written stays, for --resume."""
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._partial is not None:
            self._partial.release()


def to_records(
    prompt: PromptRecord, completions: list[Completion], ids: list[int] | None = None
) -> list[dict[str, Any]]:
    """The continuations of a prompt as plain values: the lines of the output, with its `ids` where they are given."""
    head: dict[str, Any] = {"index": prompt.position, "samples": len(completions), "prompt": prompt.prompt}
    if ids is not None:
        head |= {"prompt_ids": ids, "prompt_shape": [1, len(ids)]}
    return [{**head, "sample": sample, **_to_dict(completion)} for sample, completion in enumerate(completions)]


def to_line(record: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _to_dict(completion: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": completion.text,
        "ids": completion.ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.score is not None:
        record["score"] = completion.score
    if completion.error is not None:
        record["error"] = completion.error
    if any(token.logprob is not None for token in completion.tokens):
        record["logprobs"] = [_scored(token) for token in completion.tokens]
    if completion.prompt is not None:
        record["prompt_logprobs"] = [_scored(token) for token in completion.prompt]
    return record


def _scored(token: Token) -> dict[str, Any]:
    values = {"id": token.id, "logprob": token.logprob, "top": dict(token.top)}
    if token.processed_logprob is not None:
        values |= {"processed_logprob": token.processed_logprob, "processed_top": dict(token.processed_top)}
    return values
