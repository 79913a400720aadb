"""The record that a checkpoint holds of its training: recipe, data and figures, for those who publish the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.checkpoint.format import KEY, Header
from lit_gpt.checkpoint.torch_file import OpenTorchFile

MAX_PROMPTS, MAX_PROMPT_LENGTH = 8, 400
"""Of the sample prompts that a checkpoint keeps: how many, and characters of each."""
_DATA_STATE = "TokenDataModule"
_LOSS = "val/loss"


@dataclass(frozen=True)
class TrainingRecord:
    """What a checkpoint says of the run that made it; None, or nothing in a dict, where it does not say.

    Attributes:
        steps: optimizer steps that were made.
        rows: rows of tokens that a step took, over all ranks.
        row_tokens: tokens of a row.
        precision: of the Trainer.
        seed: of the run.
        optimizer: name and settings.
        schedule: of the learning rate, likewise.
        path: of the data: a folder or address.
        source: the text that it was made of.
        fingerprint: SHA-256 of what the training tokens are, as hexadecimal digits.
        of_pairs: whether it was trained on pairs of answers, whose loss is of another kind.
        validation: `loss` (nats a token), `perplexity` and `bits_per_byte` of the latest validation, and its `step`; of
            pairs `loss`, `reward_accuracy` and `reward_margin`.
        best_loss: the lowest `loss` of all validations of the run.
        sample_prompts: texts to begin with that suit it: beginnings of its training text, and those that it continued.
    """

    steps: int | None = None
    rows: int | None = None
    row_tokens: int | None = None
    precision: str | None = None
    seed: int | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    source: str | None = None
    fingerprint: str | None = None
    of_pairs: bool = False
    validation: Mapping[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    sample_prompts: tuple[str, ...] = ()

    @property
    def tokens(self) -> int | None:
        """Tokens that were trained on, each time they were."""
        if self.steps is None or self.rows is None or self.row_tokens is None:
            return None
        return self.steps * self.rows * self.row_tokens


def training_record(file: OpenTorchFile, header: Header) -> TrainingRecord:
    """What an open checkpoint of ours says of its training. A value of another kind than `fit` writes is left out."""
    entry, state = file.content[KEY], _group(file.content.get(_DATA_STATE))
    batch, accumulate = _count(header.data.get("batch_size")), _count(state.get("accumulate"))
    block_size, of_pairs = _count(state.get("block_size")), header.data.get("format") == "pairs"
    return TrainingRecord(
        steps=_count(header.step),
        rows=None if batch is None or accumulate is None else batch * accumulate,
        row_tokens=None if block_size is None else block_size * (2 if of_pairs else 1),
        precision=header.precision,
        seed=_whole(entry.get("seed")),
        optimizer=_group(header.hyper_parameters.get("optimizer")),
        schedule=_group(header.hyper_parameters.get("schedule")),
        path=_text(header.data.get("path")),
        source=_text(header.data.get("source")),
        fingerprint=_text(state.get("fingerprint")),
        of_pairs=of_pairs,
        validation={
            name: float(value)
            for name, value in _group(entry.get("validation")).items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        },
        best_loss=_best_loss(file),
        sample_prompts=tuple(plain_prompts(entry.get("sample_prompts"))),
    )


def plain_prompts(values: object) -> list[str]:
    """The sample prompts among `values`: short texts, not blank, that UTF-8 can write; all else is left out."""
    found = values if isinstance(values, (list, tuple)) else ()
    texts = [text for text in found if isinstance(text, str) and len(text) <= MAX_PROMPT_LENGTH and text.strip()]
    return [text for text in texts if not any("\ud800" <= character <= "\udfff" for character in text)][:MAX_PROMPTS]


def _best_loss(file: OpenTorchFile) -> float | None:
    """The score of the callback that keeps `best.ckpt`."""
    states = _group(file.content.get("callbacks"))
    name = next((name for name, state in states.items() if _group(state).get("monitor") == _LOSS), None)
    score = None if name is None else file.tensors("callbacks", name).get("best_model_score")
    if score is None or score.numel() != 1 or not score.is_floating_point():
        return None
    loss = file.read(score).item()
    return loss if math.isfinite(loss) else None


def _group(value: object) -> dict[str, Any]:
    """A dict whose keys are text, as it is; anything else as an empty one."""
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else {}


def _whole(value: object) -> int | None:
    """A whole number that can be printed; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63 else None


def _count(value: object) -> int | None:
    number = _whole(value)
    return number if number is not None and number > 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
