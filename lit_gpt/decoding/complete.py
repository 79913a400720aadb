"""From prompts to finished texts: many prompts through one engine, each as soon as there is room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lit_gpt.decoding.engine import Engine
from lit_gpt.decoding.output import FinishReason, Output, Token
from lit_gpt.decoding.params import GenerationConfig
from lit_gpt.decoding.run import Value
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer

Prompt = str | Sequence[int]
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
        """Take the news."""
        self.text += output.text
        self.tokens += output.tokens
        self.finish_reason = output.finish_reason
        self.score = output.score
        self.error = output.error
        self.prompt = output.prompt or self.prompt


def encode_prompt(tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    """Ids of a prompt. Text gets what must stand before every text in front; ids are taken as they are.

    Raises:
        UserError: for text where there is no tokenizer.
    """
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise UserError("this model came without a tokenizer: give the prompt as token ids")
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(prompt)


def complete(
    engine: Engine, prompts: Iterable[Sequence[int]], generation: GenerationConfig, value: Value | None = None
) -> Iterator[tuple[int, list[Completion]]]:
    """Continue all prompts; they are taken from `prompts` only as there is room for them.

    Yields:
        (place of the prompt, its continuations), as they are finished.
    """
    source, places = enumerate(prompts), {}  # request → place
    unfinished: dict[int, dict[int, Completion]] = {}
    exhausted = False
    while not exhausted or engine.has_work:
        while not exhausted and engine.n_waiting < max(1, engine.rows.n_row // 4):
            place, ids = next(source, (-1, ()))
            exhausted = place < 0
            if not exhausted:
                request = engine.submit(ids, generation, value)
                places[request], unfinished[request] = place, {}
        outputs = engine.step()
        for output in outputs:
            unfinished[output.request].setdefault(output.index, Completion()).add(output)
        for request in {output.request for output in outputs}:
            made = unfinished[request]
            if len(made) >= generation.continuations and all(one.finish_reason for one in made.values()):
                del unfinished[request]
                yield places.pop(request), [made[index] for index in sorted(made)]
