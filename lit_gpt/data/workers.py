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

from lit_gpt.tokenizer.tokenizer import Tokenizer

START = "import lit_gpt.data.workers as workers; workers.run_worker()"
QUEUED_JOBS = 2  # jobs queued for each worker, so that none waits for its next


@dataclass
class EncodedSplit:
    """What one split gets of a job: tokens (n,) of the shards' dtype, documents that end there, bytes of text."""

    tokens: np.ndarray
    documents: int
    text_bytes: int


TokenizeJob = list[tuple[str, bool, str]]  # pieces of text: the text, whether a document ends, the split
TokenizeResult = dict[str, EncodedSplit]  # by split


def encode(tokenizer: Tokenizer, dtype: str, job: TokenizeJob) -> TokenizeResult:
    """Tokenize a job; the end-of-text token stands after each document, if the tokenizer has one."""
    eot = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype)
    parts: dict[str, list[np.ndarray]] = {}
    result: TokenizeResult = {}
    for text, ends, split in job:
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


def run_worker() -> None:
    """The loop of a worker: it reads tokenizer and dtype, then jobs until the caller closes the pipe or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends us
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not end up between answers
    try:
        tokenizer, dtype = pickle.load(sys.stdin.buffer)
        while True:
            job = pickle.load(sys.stdin.buffer)
            pickle.dump(encode(tokenizer, dtype, job), answers, protocol=5)
            answers.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        pass  # the caller has closed the pipe; an UnpicklingError if it was killed in the middle of a message


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

    def __init__(self, tokenizer: Tokenizer, dtype: str, count: int) -> None:
        self._tokenizer, self._dtype, self._count = tokenizer, dtype, count
        self._of_thread = threading.local()  # each thread has one process
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        if self._count > 1:
            self._setup = pickle.dumps((self._tokenizer, self._dtype), protocol=5)
            self._threads = ThreadPoolExecutor(self._count, initializer=self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._count == 1:
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
            RuntimeError: a process died.
        """
        if self._count == 1:
            yield from (encode(self._tokenizer, self._dtype, job) for job in jobs)
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
        self._of_thread.process.stdin.write(self._setup)

    def _tokenize(self, job: TokenizeJob) -> TokenizeResult:
        process: Any = self._of_thread.process
        try:
            pickle.dump(job, process.stdin, protocol=5)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            status = process.wait()
            raise RuntimeError(
                f"a tokenizing process ended with status {status} (-9: killed, often for want of memory); "
                "run the same command again, it goes on"
            ) from error
