"""`predict`: prompts in, continuations out, in the order of the input, on any number of devices."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Subset

from lit_gpt.config import GPTConfig
from lit_gpt.data.prompts import Prompt, PromptDataset
from lit_gpt.decoding.complete import Completion, encode_prompt
from lit_gpt.decoding.output import Token
from lit_gpt.decoding.params import GenerationConfig
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_write
from lit_gpt.tokenizer import Tokenizer

Finished = list[tuple[Prompt, list[Completion]]]
"""What a `predict_step` returns: prompts that are finished, each with its continuations."""

_BATCH = 64
"""Prompts that a `predict_step` takes; the engine works on as many of them at once as it has room for."""

_RULE = "-" * 15


@dataclass(frozen=True)
class PredictOptions:
    """The flags of `predict` beside `GenerationConfig`'s.

    Attributes:
        start: a prompt, or FILE:story.md for one that is a whole file; can be given several times.
        prompts: a file with a prompt on each line, or a .jsonl with a "prompt" (text or token ids) on each line.
        output: a .jsonl file for the results; until all are there its name ends in .partial. They are printed if null.
        resume: go on with a run that was killed; what is in its .partial file is not done again.
        precision: of the weights: auto, fp32, bf16 or int8.
    """

    start: list[str] = field(default_factory=list)
    prompts: str | None = None
    output: str | None = None
    resume: bool = False
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"


def check_prompts(
    prompts: Iterable[Prompt], tokenizer: Tokenizer | None, config: GPTConfig, generation: GenerationConfig
) -> None:
    """Refuse, before any work, prompts that this model cannot continue.

    Raises:
        UserError: naming the prompt.
    """
    n_vocab = config.vocab_size
    eot = None if tokenizer is None else tokenizer.eot_id
    for place, prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        what = f"prompt {place + 1}"
        if not ids and eot is None:
            raise UserError(f"{what} is empty and the tokenizer has no end-of-text to start from: write a prompt")
        wrong = next((token for token in ids if not 0 <= token < n_vocab), None)
        if wrong is not None:
            raise UserError(f"{what} has token id {wrong}, outside the vocabulary: use ids 0 … {n_vocab - 1}")
        if generation.overflow == "stop" and len(ids) > config.block_size:
            raise UserError(
                f"{what} has {len(ids)} tokens, the model's context is {config.block_size}: "
                f"shorten it, or use --overflow slide"
            )


class PartialFile:
    """The results so far of a run that writes to `output`: `output.partial`, and one more file for each further rank.

    A line is one continuation. The lines of a prompt are written together; the first line says what the run is.
    """

    def __init__(self, output: str | os.PathLike[str], run: str) -> None:
        """Results of the run with the fingerprint `run`."""
        self.output = Path(output)
        self._run = run

    def path(self, rank: int) -> Path:
        """The file of one rank."""
        return self.output.with_name(f"{self.output.name}.partial{'' if rank == 0 else f'.{rank}'}")

    def _paths(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{self.output.name}.partial*"))

    def finished(self, resume: bool) -> set[int]:
        """Prompts that need not be done again.

        Raises:
            UserError: if a run would be overwritten, or was begun with other prompts or settings.
        """
        if self.output.exists():
            raise UserError(f"{self.output} exists already and is complete: delete it, or name another file")
        if not self._paths():
            return set()
        if not resume:
            raise UserError(f"{self._paths()[0]} is an unfinished run: go on with --resume, or delete it")
        return {index for path in self._paths() for index, _, _ in self._groups(path)}

    def _groups(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """(prompt, offset, length in bytes) of every prompt whose lines are all there."""
        with path.open("rb") as file:
            head = file.readline()
            if head.endswith(b"\n") and json.loads(head).get("run") != self._run:
                raise UserError(f"{path} was begun with other prompts, settings or weights: delete it to begin anew")
            offset = end = len(head)
            for line in file:
                if not line.endswith(b"\n"):  # killed in the middle of it
                    return
                end += len(line)
                record = json.loads(line)
                if record["sample"] + 1 == record["samples"]:
                    yield record["index"], offset, end - offset
                    offset = end

    def append(self, rank: int) -> IO[bytes]:
        """The file of one rank, open at the end of what is whole in it."""
        path = self.path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        groups = list(self._groups(path)) if path.exists() else []
        file = path.open("r+b" if path.exists() else "w+b")
        if groups:
            _, offset, size = groups[-1]
            file.truncate(offset + size)
        else:
            file.truncate(0)
            file.write(json.dumps({"run": self._run}).encode() + b"\n")
            file.flush()
        file.seek(0, os.SEEK_END)
        return file

    def merged(self) -> Iterator[bytes]:
        """The lines of all ranks in the order of the input."""
        paths = self._paths()
        places = sorted(
            (index, number, offset, size)
            for number, path in enumerate(paths)
            for index, offset, size in self._groups(path)
        )
        files = [path.open("rb") for path in paths]
        try:
            for _, number, offset, size in places:
                files[number].seek(offset)
                yield files[number].read(size)
        finally:
            for file in files:
                file.close()

    def finish(self) -> None:
        """Write the output, whole and in order, and drop the partial files."""
        with atomic_write(self.output) as file:
            for lines in self.merged():
                file.write(lines)
        for path in self._paths():
            path.unlink()


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returns: to the file, or readable and in order to stdout. Shows progress on stderr.

    Attributes:
        failed: continuations that ended in an error.
    """

    def __init__(self, partial: PartialFile | None, total: int, tokenizer: Tokenizer | None = None) -> None:
        """A writer of `total` prompts' results."""
        super().__init__("batch")
        self._partial = partial
        self._total = total
        self._tokenizer = tokenizer
        self._file: IO[bytes] | None = None
        self._progress = Progress(
            TextColumn("prompts"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._early: dict[int, tuple[Prompt, list[Completion]]] = {}
        self._next = 0
        self.failed = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open what is needed."""
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
            self.failed += sum(completion.error is not None for completion in completions)
            if self._file is not None:
                self._file.write(b"".join(to_lines(prompt, completions)))
            else:
                self._early[prompt.place] = prompt, completions
        if self._file is not None:
            self._file.flush()
        self._progress.update(self._task, advance=len(prediction))
        while self._file is None and self._next in self._early:
            self._print(*self._early.pop(self._next))
            self._next += 1

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was; what is written stays, for --resume."""
        self._progress.stop()

    def _print(self, prompt: Prompt, completions: list[Completion]) -> None:
        for completion in completions:
            text = completion.text if self._tokenizer is not None else f" {completion.ids}"
            shown = prompt.prompt if isinstance(prompt.prompt, str) else self._readable(prompt.prompt)
            if completion.score is not None:
                print(f"score {completion.score:.4f}")
            print(f"{shown}{text}")
            if completion.error is not None:
                print(f"prompt {prompt.place + 1}: {completion.error}", file=sys.stderr)
            if self._total > 1 or len(completions) > 1:
                print(_RULE)
        sys.stdout.flush()

    def _readable(self, ids: list[int]) -> str:
        return str(ids) if self._tokenizer is None else self._tokenizer.decode(ids)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All ranks are through: rank 0 puts the results together."""
        self._progress.stop()
        if self._file is None or self._partial is None:
            return
        self._file.close()
        trainer.strategy.barrier("predictions are written")
        if trainer.is_global_zero:
            self._partial.finish()


def to_lines(prompt: Prompt, completions: list[Completion]) -> Iterator[bytes]:
    """The continuations of a prompt, each as a line of JSON."""
    for sample, completion in enumerate(completions):
        record = {"index": prompt.place, "sample": sample, "samples": len(completions), "prompt": prompt.prompt}
        record |= _to_dict(completion)
        yield json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


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


def run_fingerprint(prompts: PromptDataset, generation: GenerationConfig, source: str) -> str:
    """What identifies a run: its prompts, its settings and the weights it uses (a file by size and time)."""
    path = Path(source)
    stat = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
    values = [prompts.fingerprint, generation.to_dict(), source, stat]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prompt_loader(prompts: PromptDataset, finished: set[int]) -> DataLoader[Prompt]:
    """Batches of the prompts that are not finished; Lightning splits them over the ranks."""
    left = [index for index in range(len(prompts)) if index not in finished]
    return DataLoader(Subset(prompts, left), batch_size=_BATCH, collate_fn=list)
