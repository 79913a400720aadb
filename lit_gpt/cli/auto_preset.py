"""`model.preset: auto`: the defaults that a text's length, the run's time and the machine imply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from lit_gpt.console.messages import note
from lit_gpt.data.index import TEXT
from lit_gpt.data.prepare_inputs import check_same_sources, sources_of
from lit_gpt.data.prepare_state import DOWNLOADS
from lit_gpt.data.readers import read_texts
from lit_gpt.data.remote import is_remote
from lit_gpt.data.shard_folder import is_prepared, load_index
from lit_gpt.data.text_source import TextSource
from lit_gpt.errors import UserError
from lit_gpt.train.budget import parse_duration
from lit_gpt.train.callbacks.throughput import peak_flops
from lit_gpt.train.plan import TextPlan, plan_for_text
from lit_gpt.train.precision import cpu_has_bf16, device_type
from lit_gpt.train.rank_zero import connect_ranks, decide_once, is_rank_zero

AUTO = "auto"
_COUNTED = 4_000_000
"""Characters of a text that are looked at, to tell how many different ones there are."""


def auto_defaults(options: Namespace) -> dict[str, Any]:
    """Defaults by the parser's dotted keys, and one line on stderr that says why. Rank 0 decides for all.

    Args:
        options: of `fit`, as parsed.

    Raises:
        UserError: no time is given, or no text whose length is known.
    """
    trainer = options.trainer
    if trainer.max_time is None:
        raise UserError("model.preset=auto goes by the time that there is: give --trainer.max_time 00:00:10:00, say")
    seconds = parse_duration(trainer.max_time).total_seconds()
    connect_ranks(trainer)

    def decide() -> str:
        size, vocabulary, characters = _read_text(options.data)
        chosen = plan_for_text(size, seconds, _flops(trainer), vocabulary, characters)
        return json.dumps([asdict(chosen), is_prepared(options.data.path)])  # before rank 0 prepares it

    values, has_tokenizer = json.loads(decide_once("plan", decide))
    chosen = TextPlan(**values)
    if is_rank_zero():
        note(f"preset auto: {chosen.reason}")
    config = {f"model.config.{key}": value for key, value in chosen.config.items()}
    return config if has_tokenizer else {**config, "data.tokenizer": f"bpe:{chosen.vocabulary}"}


def _read_text(data: Namespace) -> tuple[int, int | None, int]:
    """UTF-8 bytes of the text, the size of its vocabulary, and how many different characters it has.

    Of a text that is prepared these are the bytes of training only, and characters are not counted; of one that is not,
    there is no vocabulary.
    """
    path, source = data.path, data.source
    if data.format != TEXT or data.mixture is not None or path is None or is_remote(path):
        raise UserError(
            "model.preset=auto is for one text: give --data.path FOLDER and --data.source TEXT, or a preset"
        )
    if is_prepared(path):
        if source is not None:
            check_same_sources(path, source, TEXT)
        index = load_index(path)
        return sum(shard.text_bytes for shard in index.shards if shard.split == "train"), index.vocab_size, 0
    if source is None:
        raise UserError(f"{path} has no token shards: give --data.source TEXT to make them, or another --data.path")
    sources = sources_of([source], Path(path) / DOWNLOADS, "text", None)
    away = [each.url for each in sources if each.url and not each.path.exists()]
    if away:
        raise UserError(f"model.preset=auto cannot tell the length of {away[0]}: fetch it, and name the file")
    return sum(each.size for each in sources), None, _count_characters(sources)


def _count_characters(sources: Sequence[TextSource]) -> int:
    """How many different characters the text begins with. Raises UserError, if it is not UTF-8."""
    found: set[str] = set()
    left = _COUNTED
    for source in sources:
        for text in read_texts(source):
            found.update(text.text)
            left -= len(text.text)
            if left <= 0:
                return len(found)
    return len(found)


def _flops(trainer: Namespace) -> float:
    """FLOP/s of large products on the first device, in the precision that the run will probably have."""
    kind = device_type(trainer.accelerator)
    precision = trainer.precision or AUTO
    if precision == AUTO:
        precision = "32-true" if kind == "cpu" and not cpu_has_bf16() else "bf16-mixed"
    return peak_flops(torch.device(kind), precision)
