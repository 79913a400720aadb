"""Samples of several models side by side: the same prompts and the same seeds for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_gpt.runs.record import RunRecord

if TYPE_CHECKING:
    from lit_gpt.api import Generator

DEFAULT_PROMPT = "\n"


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn.

    Attributes:
        prompts: to continue.
        num_samples: of each, with the seeds `seed`, `seed` + 1, …; 0 for none.
        max_new_tokens: of each sample.
        temperature: of the draws.
        top_k: draw among so many likeliest tokens; None for all.
        seed: of the first.
    """

    prompts: tuple[str, ...]
    num_samples: int = 2
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 1

    def check(self) -> None:
        """Refuse settings that are wrong, before a model is read. Raises UserError."""
        from lit_gpt.api import GenerationConfig

        GenerationConfig.from_dict(self.to_generate()).check()

    def to_generate(self) -> dict[str, Any]:
        """The keywords of `generate`."""
        return {
            "num_samples": self.num_samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class SampleSet:
    """What the models write after one prompt with one seed.

    Attributes:
        prompt: itself.
        seed: of the draws.
        texts: name of a group → the continuation by its first run.
    """

    prompt: str
    seed: int
    texts: dict[str, str]


def prompts_of(runs: Sequence[RunRecord], asked: Sequence[str]) -> tuple[str, ...]:
    """The prompts: those that were asked for, or those that all runs had for their samples, or a line end."""
    if asked:
        return tuple(asked)
    found = [group.get("prompts") if isinstance(group := run.config.get("samples"), dict) else None for run in runs]
    first = found[0]
    if isinstance(first, list) and first and all(other == first for other in found):
        texts = [text for text in first if isinstance(text, str) and text]
        if len(texts) == len(first):
            return tuple(texts)
    return (DEFAULT_PROMPT,)


def draw_samples(gpt: Generator, settings: SampleSettings) -> list[list[str]]:
    """For each prompt its continuations by a model, by seed.

    Raises:
        UserError: for settings or prompts that are wrong.
    """
    completed = gpt.complete(list(settings.prompts), **settings.to_generate())
    return [[completion.text for completion in completions] for completions in completed]


def side_by_side(settings: SampleSettings, drawn: dict[str, list[list[str]]]) -> list[SampleSet]:
    """The samples of all groups, prompt by prompt and seed by seed."""
    return [
        SampleSet(prompt, settings.seed + number, {name: texts[index][number] for name, texts in drawn.items()})
        for index, prompt in enumerate(settings.prompts)
        for number in range(settings.num_samples)
    ]
