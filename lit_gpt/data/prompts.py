"""Prompts for `predict`: from the command line, from a file of lines, from JSON lines."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message, TemplateFailed

FILE_PREFIX = "FILE:"
"""`--start FILE:story.md` is one prompt, the file's whole text, as in nanoGPT."""


class PromptRecord(NamedTuple):
    """A prompt of the input.

    Attributes:
        position: in the input, from 0.
        prompt: text or ids.
        ids: what the model goes on with, where that is more than the prompt: a conversation.
        model: the name of the adapter that is to continue it, where its line says so.
    """

    position: int
    prompt: str | list[int]
    ids: list[int] | None = None
    model: str | None = None


class PromptDataset(Dataset[PromptRecord]):
    """Prompts by their position. Of a file only the offsets of its lines are held, so it may be as large as the disk.

    Attributes:
        fingerprint: hash of all prompts in their order.
    """

    def __init__(self, start: Sequence[str] = (), prompts: str | None = None) -> None:
        """Read and check everything once.

        Args:
            start: prompts, or `FILE:path` for one that is a whole file.
            prompts: a file: `.jsonl` with an object on each line whose "prompt" is text or a list of ids, and whose
                "model" may name an adapter, else text with a prompt on each line. Empty lines are skipped.

        Raises:
            UserError: for a file that is missing, not UTF-8 or not JSON lines, or if there is no prompt at all.
        """
        self._start = [_whole(text) for text in start]
        self._path = None if prompts is None else Path(prompts)
        self._offsets = array("Q")
        digest = hashlib.sha256(json.dumps(self._start).encode())
        if self._path is not None:
            for offset, line in _lines(self._path):
                _parse(self._path, line, len(self._offsets) + 1)
                self._offsets.append(offset)
                digest.update(line)
        if not len(self):
            where = "there are no prompts" if self._path is None else f"{self._path} has no prompts"
            raise UserError(f'{where}: give --start "some text", or --prompts FILE with one prompt a line')
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._start) + len(self._offsets)

    def __getitem__(self, index: int) -> PromptRecord:
        if index < len(self._start):
            return PromptRecord(index, self._start[index])
        if index >= len(self):
            raise IndexError(index)
        assert self._path is not None
        with self._path.open("rb") as file:
            file.seek(self._offsets[index - len(self._start)])
            prompt, model = _parse(self._path, file.readline(), index + 1)
            return PromptRecord(index, prompt, model=model)

    def __iter__(self) -> Iterator[PromptRecord]:
        return (self[index] for index in range(len(self)))


class ChatPrompts(Dataset[PromptRecord]):
    """Prompts as what a user says, each in a conversation of its own, up to where the assistant's turn begins.

    Attributes:
        fingerprint: hash of all prompts in their order, and of what stands around them.
    """

    def __init__(self, prompts: PromptDataset, template: ChatTemplate, system: str | None) -> None:
        """The messages of users in `prompts`, after the system's message if there is one."""
        self._prompts = prompts
        self._template = template
        self._before = [] if system is None else [Message("system", system)]
        around = [prompts.fingerprint, template.tokenizer.chat_template, system]
        self.fingerprint = hashlib.sha256(json.dumps(around).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> PromptRecord:
        """Raises UserError for ids, and for what the template refuses."""
        record = self._prompts[index]
        position, prompt = record.position, record.prompt
        if not isinstance(prompt, str):
            raise UserError(f"prompt {position + 1} is a list of ids: --chat needs text, which it puts in its template")
        try:
            ids = self._template.encode_prompt([*self._before, Message("user", prompt)])
        except TemplateFailed as error:
            raise UserError(f"prompt {position + 1}: the model's chat template refuses it: {error}") from None
        return record._replace(ids=ids)

    def __iter__(self) -> Iterator[PromptRecord]:
        return (self[index] for index in range(len(self)))


def _whole(text: str) -> str:
    """A prompt of the command line."""
    if not text.startswith(FILE_PREFIX):
        return text
    path = Path(text[len(FILE_PREFIX) :])
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--start {text}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--start {text}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that is not empty."""
    try:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    yield offset, line
                offset += len(line)
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror or error}") from error


def _parse(path: Path, line: bytes, number: int) -> tuple[str | list[int], str | None]:
    """The prompt on one line, and the model that it names; `number` is for messages."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: prompt {number} is not UTF-8 text at its byte {error.start}") from error
    if path.suffix != ".jsonl":
        return text.removesuffix("\n").removesuffix("\r"), None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: prompt {number} is not JSON ({error}): write one object a line") from error
    prompt, model = (value.get("prompt"), value.get("model")) if isinstance(value, dict) else (None, None)
    name = model if isinstance(model, str) else None
    if isinstance(prompt, str):
        return prompt, name
    if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return prompt, name
    raise UserError(f'{path}: prompt {number} has no "prompt" that is text or a list of token ids: {text.strip()[:60]}')
