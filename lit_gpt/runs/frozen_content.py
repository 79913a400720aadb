"""The files of a frozen model: checkpoint, tokenizer, configuration, log, origin, samples and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gpt.checkpoint.format import KEY, load_checkpoint, save_checkpoint
from lit_gpt.checkpoint.frozen import PREFIX, checkpoint_name
from lit_gpt.checkpoint.provenance import code_version, environment
from lit_gpt.checkpoint.run_log import RUN_LOG
from lit_gpt.convert.card_samples import LENGTH, SEED, TEMPERATURE, TOP_K, sample_texts
from lit_gpt.convert.model_card import CardDetails, model_card
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.files.atomic import atomic_write
from lit_gpt.runs.record import CONFIG, RunRecord

ORIGIN, SAMPLES, CARD = "origin.json", "samples.json", "README.md"
_SAMPLES = 3
_KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
    "TokenDataModule",
)
"""Entries of a run's checkpoint that say what it was trained on; those of the optimizer and the loops are left out."""
_OF_ADAPTERS = ("lora", "base_precision")


@dataclass(frozen=True)
class FreezeOrder:
    """What is frozen.

    Attributes:
        run: with a checkpoint.
        source: that checkpoint, its weights not read yet; of an adapter merged with its base.
        name: of the frozen model.
        frozen_at: the time, in UTC.
        licence: entries of the model card's metadata; empty for none.
    """

    run: RunRecord
    source: SourceCheckpoint
    name: str
    frozen_at: str
    licence: Mapping[str, str] = field(default_factory=dict)


def write_content(order: FreezeOrder, folder: Path) -> None:
    """Write all files but the manifest into `folder`.

    Raises:
        UserError: if the checkpoint cannot be read.
    """
    run, source = order.run, order.source
    assert run.checkpoint is not None
    save_checkpoint(folder / checkpoint_name(order.name), _checkpoint(run.checkpoint, source))
    if source.tokenizer is not None:
        source.tokenizer.save(folder / "tokenizer.json")
    for name in (CONFIG, RUN_LOG):
        if (run.folder / name).is_file():
            with atomic_write(folder / name) as file:
                file.write((run.folder / name).read_bytes())
    texts = _sample(source)
    settings = {"count": len(texts), "seed": SEED, "temperature": TEMPERATURE, "top_k": TOP_K, "max_new_tokens": LENGTH}
    _write_json(folder / SAMPLES, {"from": "nothing", **settings, "texts": texts})
    _write_json(folder / ORIGIN, _origin(order))
    counts = [stored.nbytes // stored.dtype.itemsize for stored in source.weights.values()]
    details = CardDetails(f"{PREFIX}{order.name}", None, sum(counts), order.licence, (), texts)
    with atomic_write(folder / CARD, "w") as file:
        file.write(model_card(source, details))


def _checkpoint(path: Path, source: SourceCheckpoint) -> dict[str, Any]:
    """A checkpoint that every command takes, without the state of the run: a run cannot go on from it."""
    content = load_checkpoint(path)
    state = {f"model.{name}": stored.read() for name, stored in source.weights.items()}
    if source.config.tie_embeddings:
        state["model.lm_head.weight"] = state["model.wte.weight"]
    config = source.config.to_dict()
    left_out = _OF_ADAPTERS if source.is_adapter else ()
    settings = {key: value for key, value in (content.get("hyper_parameters") or {}).items() if key not in left_out}
    entry = {key: value for key, value in content[KEY].items() if key != "adapter"}
    tokenizer = None if source.tokenizer is None else source.tokenizer.to_dict()
    return {
        **{key: content[key] for key in _KEPT if key in content},
        "state_dict": state,
        "hyper_parameters": {**settings, "config": config},
        "callbacks": _best_score(content.get("callbacks")),
        KEY: {**entry, "config": config, "tokenizer": tokenizer},
    }


def _best_score(callbacks: Any) -> dict[str, Any]:
    """Of the callbacks' states the lowest loss of the run, which model cards tell."""
    states = callbacks if isinstance(callbacks, dict) else {}
    return {
        name: {"monitor": state["monitor"], "best_model_score": state["best_model_score"].clone()}
        for name, state in states.items()
        if isinstance(state, dict) and state.get("monitor") and isinstance(state.get("best_model_score"), Tensor)
    }


def _sample(source: SourceCheckpoint) -> list[str]:
    """Texts by the model; none where it has no tokenizer, or its logits are no numbers."""
    if source.tokenizer is None:
        return []
    return sample_texts(source.to("float32").load(), source.tokenizer, _SAMPLES)


def _origin(order: FreezeOrder) -> dict[str, Any]:
    """Where the model comes from: run, data, code, environment and loss."""
    run, source, about = order.run, order.source, order.run.about
    assert run.checkpoint is not None
    training = source.training
    own = {"code": about.get("code"), "environment": about.get("environment"), "device": about.get("device")}
    return {
        "name": order.name,
        "frozen_at": order.frozen_at,
        "run": {
            "folder": run.folder.absolute().name,
            "checkpoint": run.checkpoint.name,
            "finished": run.finished,
            "steps": run.steps,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "flops": run.flops,
            "peak_memory_bytes": run.peak_memory,
            **own,
        },
        "validation": {} if training is None else dict(training.validation),
        "data": {
            "train_sha256": about.get("train_sha256") or (None if training is None else training.fingerprint),
            "val_sha256": about.get("val_sha256"),
            "tokenizer_sha256": None if source.tokenizer is None else source.tokenizer.hash,
        },
        "weights_sha256": source.weights_sha256,
        "frozen_with": {"code": code_version(), "environment": environment()},
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
