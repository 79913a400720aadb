"""`predict`: prompts in, continuations out, in the order of the input, on any number of devices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import lightning.pytorch as L
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Subset

from lit_gpt.atomic import atomic_write
from lit_gpt.console import note
from lit_gpt.data.prompts import FILE_PREFIX, PromptDataset, PromptRecord
from lit_gpt.errors import UserError
from lit_gpt.generation.complete import Completion, encode_prompt
from lit_gpt.generation.generation_config import NGRAM, GenerationConfig
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.prompts import check_prompt
from lit_gpt.generation.trace import Tracer
from lit_gpt.insight.trace_view import TraceWriter
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import Tokenizer

Finished = list[tuple[PromptRecord, list[Completion]]]
"""What a `predict_step` returns: prompts that are finished, each with its continuations."""

_BATCH = 64
"""Prompts that a `predict_step` takes; the engine works on as many of them at once as it has room for."""

_RULE = "-" * 15

InferencePrecision = Literal["auto", "fp32", "bf16", "int8"]


def add_predict_arguments(parser: ArgumentParser) -> None:
    """The flags of `predict`: `GenerationConfig`'s, and where prompts come from and results go."""
    switches = {"ignore_eos": "never generate end-of-text"}
    parser.add_class_arguments(GenerationConfig, skip=set(switches))
    switches["resume"] = "go on with a run that was killed: what is in its .partial file is not done again"
    switches["trace"] = "show how each token was chosen: candidates, what was cut, the draw"
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=text)
    text = f"a prompt, or {FILE_PREFIX}story.md for one that is a whole file; can be given several times"
    parser.add_argument("--start", action="append", type=str, default=[], help=text)
    text = 'a file with a prompt on each line, or a .jsonl with a "prompt" (text or ids) on each line'
    parser.add_argument("--prompts", type=str | None, default=None, help=text)
    text = "a .jsonl file for the results; until all are there its name ends in .partial. They are printed if null"
    parser.add_argument("--output", type=str | None, default=None, help=text)
    text = "the same as a .jsonl file, one decision on each line"
    parser.add_argument("--trace_output", type=str | None, default=None, help=text)
    text = "the same as one self-contained page, in which every token shows its alternatives"
    parser.add_argument("--trace_html", type=str | None, default=None, help=text)
    text = "of the weights: bf16 and int8 are faster, auto is bf16 on a GPU and fp32 on a CPU"
    parser.add_argument("--precision", type=InferencePrecision, default="auto", help=text)


class Prediction:
    """A run of `predict`, checked before anything is computed.

    Attributes:
        generation_config: how to continue the prompts.
        loader: the prompts that are left to do.
        writer: the callback that takes the results.
        tracer: notes how each token was chosen, if that was asked for.
        trace_writer: the callback that shows it.
    """

    def __init__(self, options: Namespace, config: GPTConfig, tokenizer: Tokenizer | None, source: str) -> None:
        """Prompts and settings as `options` has them, for a model of shape `config` that came from `source`.

        Raises:
            UserError: for settings or prompts that are wrong, or an output that is in the way.
        """
        names = [item.name for item in dataclasses.fields(GenerationConfig)]
        self.generation_config = GenerationConfig.from_dict({name: options[name] for name in names})
        for remark in self.generation_config.check():
            note(remark)
        prompts = PromptDataset(options.start, options.prompts)
        check_prompts(prompts, tokenizer, config, self.generation_config)
        self._partial: PartialFile | None = None
        finished: set[int] = set()
        if options.output is not None:
            self._partial = PartialFile(options.output, run_fingerprint(prompts, self.generation_config, source))
            finished = self._partial.finished(options.resume, len(prompts))
        elif options.resume:
            raise UserError("--resume goes on with a file of results: name it with --output")
        left = [place for place in range(len(prompts)) if place not in finished]
        self.loader = DataLoader(Subset(prompts, left), batch_size=_BATCH, collate_fn=list)
        self.writer = PredictionWriter(self._partial, len(left), tokenizer)
        self.tracer: Tracer | None = None
        self.trace_writer: TraceWriter | None = None
        if options.trace or options.trace_output is not None or options.trace_html is not None:
            self.tracer = Tracer(tokenizer)
            views = (options.trace, options.trace_output, options.trace_html)
            self.trace_writer = TraceWriter(self.tracer, tokenizer, *views)

    @property
    def draft(self) -> str | None:
        """The checkpoint that proposes tokens, if one does."""
        speculates = self.generation_config.strategy == "speculative" and self.generation_config.draft != NGRAM
        return self.generation_config.draft if speculates else None

    def already_done(self) -> bool:
        """Whether nothing is left of a resumed run; if only its last step was, that is made."""
        if len(self.loader.dataset) > 0 or self._partial is None:  # type: ignore[arg-type]
            return False
        if not self._partial.output.exists():
            self._partial.finish()
        note(f"{self._partial.output} is complete")
        return True


def check_prompts(
    prompts: Iterable[PromptRecord], tokenizer: Tokenizer | None, config: GPTConfig, generation_config: GenerationConfig
) -> None:
    """Refuse, before any work, prompts that this model cannot continue.

    Raises:
        UserError: naming the prompt.
    """
    eot_id = None if tokenizer is None else tokenizer.eot_id
    for place, prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        check_prompt(f"prompt {place + 1}", ids, config, generation_config, eot_id)


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

    def finished(self, resume: bool, total: int) -> set[int]:
        """Prompts, of `total`, that need not be done again.

        Raises:
            UserError: if a run would be overwritten, or was begun with other prompts or settings.
        """
        if self.output.exists() and resume:
            return set(range(total))
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
                yield from files[number].read(size).splitlines(keepends=True)
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
        failed: continuations of this rank that ended in an error.
    """

    def __init__(self, partial: PartialFile | None, total: int, tokenizer: Tokenizer | None = None) -> None:
        """A writer of `total` prompts' results; without `partial` to stdout."""
        super().__init__("batch")
        self._partial = partial
        self._prints = partial is None
        self._total = total
        self._tokenizer = tokenizer
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
            self._partial = PartialFile(Path(trainer.strategy.broadcast(folder)) / "results.jsonl", "")
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
            records = to_records(prompt, completions)
            self.failed += sum(completion.error is not None for completion in completions)
            if self._file is None:
                self._early[prompt.place] = records
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
            if "score" in record:
                print(f"score {record['score']:.4f}")
            print(self._readable(record["prompt"]) + (record["text"] if self._tokenizer else f" {record['ids']}"))
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

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was; what is written stays, for --resume."""
        self._progress.stop()


def to_records(prompt: PromptRecord, completions: list[Completion]) -> list[dict[str, Any]]:
    """The continuations of a prompt as plain values: the lines of the output."""
    head = {"index": prompt.place, "samples": len(completions), "prompt": prompt.prompt}
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


def run_fingerprint(prompts: PromptDataset, generation_config: GenerationConfig, source: str) -> str:
    """What identifies a run: its prompts, its settings and the weights it uses (a file by size and time)."""
    path = Path(source)
    stat = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
    values = [prompts.fingerprint, generation_config.to_dict(), source, stat]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
