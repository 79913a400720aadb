"""LoRA on the command line: the base of an adapter, and what is refused before anything is prepared or read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from lit_gpt.checkpoint.adapter import AdapterEntry
from lit_gpt.checkpoint.format import Header
from lit_gpt.checkpoint.growth import new_special_ids
from lit_gpt.convert.adapter_set import AdapterSet, open_adapters, parse_adapters
from lit_gpt.convert.recognise import open_adapter, open_base, open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.lora import LoRAConfig
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.adapter import AdapterTraining, check_lora


def find_base(header: Header, named: str | None) -> SourceCheckpoint | None:
    """The base of the adapter that `--ckpt_path` names, compared with it; None for a whole model.

    Args:
        header: of the checkpoint.
        named: by `--init_from`, where the base is elsewhere now.

    Raises:
        UserError: if it cannot be opened or is another, and for a base that a whole model has no use for.
    """
    if header.adapter is None:
        if named:
            raise UserError("--ckpt_path goes on with a run, --init_from starts from other weights: give one of them")
        return None
    base = open_base(header, named)
    open_adapter(str(header.path), base)  # which compares all that it holds with the base
    return base


def refuse_changed_adapter(subcommand: str, options: Namespace, header: Header | None) -> None:
    """What is trained can't change when a run goes on. Raises UserError, naming the key."""
    if header is None:
        return
    asked = options.model.lora.as_dict()
    if header.adapter is None:
        if asked["rank"]:
            raise UserError(
                f"model.lora.rank={asked['rank']}: {header.path} is a run that trains the whole model; start from it "
                f"with --init_from {header.path}"
            )
        return
    saved = dataclasses.asdict(header.adapter.lora)
    for key, value in asked.items():
        if value != saved[key]:
            raise UserError(
                f"model.lora.{key}={value} differs from the run's {saved[key]}: leave it out to go on with the run, or "
                f"start a new one with --init_from"
            )
    precision = header.hyper_parameters.get("base_precision", "auto")
    if subcommand == "fit" and options.model.base_precision != precision:
        raise UserError(
            f"model.base_precision={options.model.base_precision} differs from the run's {precision}: leave it out"
        )


def refuse_unfit_lora(options: Namespace, source: SourceCheckpoint | None, base: SourceCheckpoint | None) -> None:
    """Refuse LoRA without a base, over another adapter, or with targets or a rank that the model has not.

    Raises:
        UserError: naming the key.
    """
    lora = LoRAConfig(**options.model.lora.as_dict())
    if lora.rank == 0:
        AdapterTraining.of(lora, options.model.base_precision)
        return
    origin = source or base
    if origin is None:
        raise UserError(f"model.lora.rank={lora.rank} needs a base to adapt: name it with --init_from")
    if origin.is_adapter:
        raise UserError(
            f"--init_from {origin.name} is an adapter, and model.lora.rank={lora.rank} asks for one over it: go on "
            f"with it by --ckpt_path, or make one model of it and its base by lit_gpt convert"
        )
    check_lora(GPTConfig.from_dict(origin.config.to_dict()), lora)


def describe_adapter(
    adapter: AdapterTraining | None, named: str | None, base: SourceCheckpoint, tokenizer: Tokenizer | None
) -> None:
    """Tell what is trained which base it is for, and which of its ids are new.

    Args:
        adapter: gets both; None where the whole model is trained.
        named: how the user named the base; None for where it was opened.
        base: itself.
        tokenizer: of the data.
    """
    if adapter is None:
        return
    known, new_ids = base.config.vocab_size, []
    if tokenizer is not None and base.tokenizer is not None:
        new_ids = new_special_ids(tokenizer, base.tokenizer) or []
        known = base.tokenizer.n_vocab
    adapter.new_tokens = range(new_ids[0], new_ids[-1] + 1) if new_ids else range(0)
    path = Path(named or base.name).expanduser()
    address = os.path.abspath(path) if path.exists() else named or base.name
    adapter.entry = AdapterEntry(address, base.weights_sha256, new_ids[0] if new_ids else known, adapter.lora)


def open_named_adapters(words: Sequence[str], options: Namespace, source: SourceCheckpoint | None) -> AdapterSet | None:
    """The adapters of `predict --adapter NAME=PATH`; None where there are none.

    Args:
        words: what was given.
        options: of the subcommand.
        source: what `--init_from` names.

    Raises:
        UserError: for what is none, is no adapter, or is one of another model.
    """
    paths = parse_adapters(words)
    if not paths:
        return None
    base = source
    if base is None:
        base = open_source(str(options.ckpt_path))
    return open_adapters(paths, base)
