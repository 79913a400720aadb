"""Processes that tokenize pieces of text.

They are plain child processes that read jobs from stdin and answer on stdout. Unlike those of `multiprocessing` they do
not import the caller's script again, copy none of its memory, and end by themselves when the caller is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lit_gpt.data.formats import MASKED_FORMATS, DocumentEncoder
from lit_gpt.data.index import TEXT
from lit_gpt.data.masks import Mask, marks_of
from lit_gpt.data.text_source import BadText
from lit_gpt.tokenizer.tokenizer import Tokenizer

START = "import lit_gpt.data.workers as workers; workers.run_worker()"
QUEUED_JOBS = 2  # jobs queued for each worker, so that none waits for its next


@dataclass
class EncodedSplit:
    """What one split gets of a job: tokens (n,) of the shards' dtype, documents that end there, bytes of text.

    `mask` is that of the tokens, (n,), where the format has one.
    """

    tokens: np.ndarray
    documents: int
    text_bytes: int
    mask: Mask | None = None


TokenizeJob = list[tuple[str, bool, str, str]]  # pieces of text: text, whether a document ends, split, where it is
TokenizeResult = dict[str, EncodedSplit]  # by split


def encode(tokenizer: Tokenizer, dtype: str, job: TokenizeJob) -> TokenizeResult:
    """Tokenize a job; the end-of-text token stands after each document, if the tokenizer has one."""
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype)
    parts: dict[str, list[np.ndarray]] = {}
    result: TokenizeResult = {}
    for text, ends, split, *_ in job:
        encoded = result.setdefault(split, EncodedSplit(eot, 0, 0))
        tokens = parts.setdefault(split, [])
        tokens.append(tokenizer.encode_to_numpy(text).astype(dtype))
        if ends:
            tokens.append(eot)
        encoded.documents += ends
        encoded.text_bytes += len(text) if text.isascii() else len(text.encode())
    for split, encoded in result.items():
        encoded.tokens = np.concatenate(parts[split])
    return result


def encode_masked(encoder: DocumentEncoder, dtype: str, job: TokenizeJob) -> TokenizeResult:
    """Tokenize a job of whole documents, with their masks; nothing is put between them.

    Raises:
        BadText: a document that cannot be encoded.
    """
    ids: dict[str, list[np.ndarray]] = {}
    masks: dict[str, list[Mask]] = {}
    result: TokenizeResult = {}
    for text, _, split, where in job:
        encoded = result.setdefault(split, EncodedSplit(np.zeros(0, dtype), 0, 0))
        for part in encoder.encode(text, where):
            ids.setdefault(split, []).append(np.array(part.ids, dtype))
            masks.setdefault(split, []).append(marks_of(part.counts))
        encoded.documents += 1
        encoded.text_bytes += len(text.encode())
    for split, encoded in result.items():
        encoded.tokens, encoded.mask = np.concatenate(ids[split]), np.concatenate(masks[split])
    return result


class JobEncoder:
    """Tokenizes jobs in one process.

    >>> JobEncoder(tokenizer, "uint16", "text")([("some text", True, "train", "")])         # doctest: +SKIP
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, data_format: str = TEXT) -> None:
        """Jobs for these shards; `data_format` is "text" or one of `MASKED_FORMATS`."""
        self._tokenizer, self._dtype = tokenizer, dtype
        self._encoder = None if data_format == TEXT else MASKED_FORMATS[data_format].encoder(tokenizer)

    def __call__(self, job: TokenizeJob) -> TokenizeResult:
        """The result of a job. Raises BadText for a document that cannot be encoded."""
        if self._encoder is None:
            return encode(self._tokenizer, self._dtype, job)
        return encode_masked(self._encoder, self._dtype, job)

    def close(self) -> None:
        """End what tokenizing has started."""
        if self._encoder is not None:
            self._encoder.close()


def run_worker() -> None:
    """The loop of a worker: it reads `JobEncoder`'s arguments, then jobs until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends us
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not end up between answers
    try:
        encode_job = JobEncoder(*pickle.load(sys.stdin.buffer))
        while True:
            job = pickle.load(sys.stdin.buffer)
            pickle.dump(_answer(encode_job, job), answers, protocol=5)
            answers.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        pass  # the caller has closed the pipe; an UnpicklingError if it was killed in the middle of a message


def _answer(encode_job: JobEncoder, job: TokenizeJob) -> TokenizeResult | BadText:
    """The result of a job, or what is wrong with its text."""
    try:
        return encode_job(job)
    except BadText as error:
        return error


def import_path() -> list[str]:
    """Where a worker looks for modules: where this process does, except in whatever folder is the current one.

    An entry "" or "." of `sys.path` (an interactive session has one) is the folder of the moment, which may be a corpus
    with a `numpy.py` in it; this package's own folder comes last, for a session that had found it by that entry.
    """
    package = Path(__file__).resolve().parents[2]
    return [*(entry for entry in sys.path if entry not in ("", ".")), str(package)]


class Workers:
    """`count` processes that tokenize; with one the work is done in this process.

    >>> with Workers(tokenizer, "uint16", 2) as workers:                      # doctest: +SKIP
    ...     for result in workers.map(jobs):
    ...         print(result["train"].tokens)
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, count: int, data_format: str = TEXT) -> None:
        self._setup, self._count = (tokenizer, dtype, data_format), count
        self._encode_here: JobEncoder | None = None
        self._of_thread = threading.local()  # each thread has one process
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        if self._count == 1:
            self._encode_here = JobEncoder(*self._setup)
        else:
            self._message = pickle.dumps(self._setup, protocol=5)
            self._threads = ThreadPoolExecutor(self._count, initializer=self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._encode_here is not None:
            self._encode_here.close()
            return
        for process in self._processes:
            if kind:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()  # closes its stdin, at which it ends

    def map(self, jobs: Iterable[TokenizeJob]) -> Iterator[TokenizeResult]:
        """The result of each job, in the order of the jobs; few are under way at any time.

        Raises:
            BadText: a document that cannot be encoded.
            RuntimeError: a process died.
        """
        if self._encode_here is not None:
            yield from map(self._encode_here, jobs)
            return
        waiting: deque[Future[TokenizeResult]] = deque()
        for job in jobs:
            waiting.append(self._threads.submit(self._tokenize, job))
            if len(waiting) > QUEUED_JOBS * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _start(self) -> None:
        self._of_thread.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START],  # without -P the current folder would be first on the path
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(import_path())},
        )
        self._processes.append(self._of_thread.process)
        self._of_thread.process.stdin.write(self._message)

    def _tokenize(self, job: TokenizeJob) -> TokenizeResult:
        process: Any = self._of_thread.process
        try:
            pickle.dump(job, process.stdin, protocol=5)
            process.stdin.flush()
            answer: TokenizeResult | BadText = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            status = process.wait()
            raise RuntimeError(
                f"a tokenizing process ended with status {status} (-9: killed, often for want of memory); "
                "run the same command again, it goes on"
            ) from error
        if isinstance(answer, BadText):
            raise answer
        return answer
