"""Run folders as `fit` leaves them, written without training, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_gpt.checkpoint.run_log import append_event

TOKENS = 1000
"""Tokens between two validations."""


def make_config(seed: int = 1, **changes: Any) -> dict[str, Any]:
    """A small config.yaml; `changes` are by dotted keys, with two underscores for each dot."""
    config: dict[str, Any] = {
        "seed_everything": seed,
        "trainer": {"max_steps": 30, "limit_val_batches": None, "default_root_dir": None, "logger": None},
        "model": {"config": {"n_layer": 2}, "optimizer": {"name": "adamw", "lr": 0.001}},
        "data": {"path": "tokens", "source": "text.txt", "tokenizer": "byte", "val_split": "tail:0.1", "seed": 1337},
        "samples": {"prompts": ["def "], "seed": 1},
        "ckpt_path": None,
    }
    for key, value in changes.items():
        *groups, name = key.split("__")
        inner = config
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return config


def write_run(
    folder: Path,
    losses: Sequence[float] = (3.0, 2.0),
    seed: int = 1,
    finished: bool = True,
    about: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
    **changes: Any,
) -> Path:
    """A run's folder with its configuration, its log, and a copy of `checkpoint` as best.ckpt if there is one."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# lightning\n" + yaml.safe_dump(make_config(seed, **changes), sort_keys=False))
    start = {"step": 0, "parameters": 1234, "tokenizer": "t" * 64, "train_sha256": "a", "val_sha256": "b"}
    append_event(folder, "start", start | (about or {}))
    spent: dict[str, Any] = {"step": 0}
    for number, loss in enumerate(losses, 1):
        spent = {"step": 10 * number, "seconds": 1.5 * number, "tokens": TOKENS * number, "flops": 1e6 * number}
        spent["peak_memory"] = 1 << 20
        append_event(folder, "validation", {**spent, "loss": loss, "bits_per_byte": loss / 2})
    if finished:
        append_event(folder, "end", spent)
    if checkpoint is not None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints/best.ckpt").write_bytes(checkpoint.read_bytes())
    return folder
