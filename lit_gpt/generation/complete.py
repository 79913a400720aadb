"""Completions: many prompts through one engine until each is finished, and one of them as it is generated."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation import Strategy, Value
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import FinishReason, Output, Token
from lit_gpt.tokenizer.tokenizer import Tokenizer

PromptInput = str | Sequence[int]
"""Text, or ids."""


@dataclass
class Completion:
    """A whole continuation.

    Attributes:
        text: without the stop string; "" where there is no tokenizer.
        tokens: with the log-probabilities that were asked for.
        finish_reason: why it ended.
        score: of a beam.
        error: what went wrong, with finish_reason `error`.
        prompt: the prompt's tokens, if `prompt_logprobs` asked for them and this is the first continuation.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    score: float | None = None
    error: str | None = None
    prompt: list[Token] | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens' ids."""
        return [token.id for token in self.tokens]

    def add(self, output: Output) -> None:
        """Append what is new."""
        self.text += output.text
        self.tokens += output.tokens
        self.finish_reason = output.finish_reason
        self.score = output.score
        self.error = output.error
        self.prompt = output.prompt or self.prompt


def encode_prompt(tokenizer: Tokenizer | None, prompt: PromptInput, ids: Sequence[int] | None = None) -> list[int]:
    """Ids of a prompt. Text gets what must stand before every text in front; ids are taken as they are.

    Args:
        tokenizer: of the model; None for one of bare ids.
        prompt: text or ids.
        ids: all that the model goes on with, where that is known already because it is more than the prompt.

    Raises:
        UserError: for text where there is no tokenizer.
    """
    if ids is not None:
        return list(ids)
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise UserError("this model came without a tokenizer: give the prompt as token ids")
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt)


Key = TypeVar("Key")


class Completions(Generic[Key]):
    """Prompts that are being continued with one engine and one set of settings, and which prompt is which."""

    def __init__(self, engine: Engine, generation_config: GenerationConfig, value: Value | None = None) -> None:
        self._engine = engine
        self._generation_config = generation_config
        self._value = value
        self._keys: dict[int, Key] = {}  # request → key
        self._unfinished: dict[int, dict[int, Completion]] = {}

    @property
    def has_capacity(self) -> bool:
        """Whether to submit another prompt: not while enough wait to fill the slots that become free next."""
        return self._engine.n_waiting < max(1, self._engine.slots.n_slot // 4)

    @property
    def busy(self) -> bool:
        """Whether a prompt is unfinished."""
        return bool(self._unfinished)

    def add(self, key: Key, ids: Sequence[int], adapter: int = 0) -> None:
        """Submit a prompt, whose name is `key`, for the model's adapter of that number, or for none."""
        request = self._engine.submit(ids, self._generation_config, self._value, adapter=adapter)
        self._keys[request], self._unfinished[request] = key, {}

    def step(self) -> list[tuple[Key, list[Completion]]]:
        """One step of the engine: the prompts that are finished now, with their continuations."""
        outputs = self._engine.step()
        for output in outputs:
            self._unfinished[output.request].setdefault(output.index, Completion()).add(output)
        finished = []
        for request in dict.fromkeys(output.request for output in outputs):
            made = self._unfinished[request]
            if len(made) >= self._generation_config.generations and all(one.finish_reason for one in made.values()):
                del self._unfinished[request]
                finished.append((self._keys.pop(request), [made[index] for index in sorted(made)]))
        return finished


def complete(
    engine: Engine,
    prompts: Iterable[Sequence[int]],
    generation_config: GenerationConfig,
    value: Value | None = None,
    adapter: int = 0,
) -> Iterator[tuple[int, list[Completion]]]:
    """Continue all prompts; `prompts` is read only as fast as the engine can work on them.

    Yields:
        (index of the prompt, its continuations), as they are finished.
    """
    completions: Completions[int] = Completions(engine, generation_config, value)
    for index, ids in enumerate(prompts):
        while not completions.has_capacity:
            yield from completions.step()
        completions.add(index, ids, adapter)
    while completions.busy:
        yield from completions.step()


def stream_outputs(
    engine: Engine, ids: Sequence[int], generation_config: GenerationConfig, strategy: Strategy | None = None
) -> Generator[Output, None, None]:
    """Continue one prompt on an engine that does nothing else. Leaving the loop ends the continuation.

    Args:
        engine: without other requests: after an error or an interrupt it is emptied.
        ids: the prompt.
        generation_config: its settings, for one sample.
        strategy: as for `Engine.submit`.

    Yields:
        After each step of the engine what is new of the continuation: nothing while the prompt is read.

    Raises:
        UserError: for settings or a prompt that are wrong; at once, not when the first output is asked for.
        RuntimeError: if the continuation fails.
    """
    return _outputs_of(engine, engine.submit(ids, generation_config, strategy=strategy))


def texts_of(outputs: Generator[Output, None, None]) -> Iterator[str]:
    """The texts of `outputs` that are not empty; leaving the loop closes them."""
    with closing(outputs):
        for output in outputs:
            if output.text:
                yield output.text


def _outputs_of(engine: Engine, request: int) -> Generator[Output, None, None]:
    try:
        while engine.has_work:
            mine = [output for output in engine.step() if output.request == request]
            for output in mine or [Output(request)]:
                if output.error is not None:
                    raise RuntimeError(output.error)
                yield output
                if output.finish_reason is not None:
                    return
    finally:
        engine.cancel_all()
