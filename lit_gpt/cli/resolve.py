"""Options that must be resolved before the Trainer is built: data, vocabulary, precision and `torch.compile`.

Lightning builds Trainer and module before it prepares data, and fixes the precision when it builds the Trainer. What is
prepared or timed here is done on rank 0, and the other ranks learn the result.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import Namespace
from torch import Tensor

from lit_gpt.checkpoint.growth import grow_weights, grown_config, new_special_ids
from lit_gpt.cli.defaults import ExistingWeights, resolve_grown_vocabulary
from lit_gpt.console.messages import note
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.option_checks import check_divisible
from lit_gpt.data.remote import RemoteFolder, is_remote
from lit_gpt.data.shard_folder import is_prepared
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.chatml import with_chat_template
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.budget import parse_duration
from lit_gpt.train.compile import resolve_compile
from lit_gpt.train.dpo import DPOConfig
from lit_gpt.train.loggers import check_logger
from lit_gpt.train.precision import Decision, device_type, resolve_precision
from lit_gpt.train.rank_zero import current_watch, decide_once, is_rank_zero
from lit_gpt.train.ranks import device_count

# Machine -------------------------------------------------------------------------------------------------------------


def check_machine(subcommand: str, options: Namespace) -> None:
    """Refuse what this machine or the batch cannot do, before the data is prepared. Raises UserError."""
    trainer, data = options.trainer, options.get("data")
    if subcommand == "predict" and trainer.precision not in ("auto", "32-true", None):
        raise UserError(
            f"trainer.precision={trainer.precision} is for training: use --precision fp32, bf16, int8 or int4"
        )
    check_logger(trainer.logger)
    if subcommand == "fit" and trainer.max_time is not None:
        parse_duration(trainer.max_time)
    for name in ("num_nodes", "accumulate_grad_batches"):
        if trainer[name] < 1:
            raise UserError(f"trainer.{name}={trainer[name]} must be at least 1")
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    device, processes = device_type(trainer.accelerator), device_count(trainer.devices, trainer.accelerator)
    if available.get(device) == 0 or (trainer.accelerator == "gpu" and device == "cpu"):
        raise UserError(f"trainer.accelerator={trainer.accelerator}: this machine has none; leave it out, or use cpu")
    most = {**available, "cpu": os.cpu_count()}.get(device)
    if most is not None and processes > most:
        kind = "CPU cores" if device == "cpu" else f"{device} devices"
        raise UserError(f"trainer.devices={trainer.devices}: this machine has {most} {kind}; take at most {most}")
    if subcommand == "fit" and data is not None:
        check_divisible(data.batch_size, rank_count(trainer))
        if data.format == "pairs" and not (options.init_from or options.ckpt_path):
            raise UserError("data.format=pairs moves a model that can answer already: give it with --init_from MODEL")
        if data.mixture is not None and options.get("remix"):
            raise UserError("--remix compares samples with the text of data.path, not with data.mixture: leave one out")
        DPOConfig(**options.model.dpo.as_dict())  # which checks itself


def rank_count(trainer: Namespace) -> int:
    """Processes that share a batch: those that have met, or else as many as the Trainer's options say."""
    watch = current_watch()
    if watch is not None:
        return watch.ranks.world_size
    return device_count(trainer.devices, trainer.accelerator) * trainer.num_nodes


# Data and vocabulary -------------------------------------------------------------------------------------------------


def resolve_data(
    subcommand: str, options: Namespace, weights: ExistingWeights, default_vocab_size: int
) -> Tokenizer | None:
    """Prepare the data if there is none, and set `vocab_size` of a new model to its vocabulary's; the tokenizer.

    Args:
        subcommand: its name; only `fit` gives a model that exists more ids.
        options: of the subcommand, changed in place.
        weights: whose tokenizer the data must have, and is prepared with unless another is named. Conversations are
            prepared with its chat template, or with ours where it has none.
        default_vocab_size: what `vocab_size` is where nobody has set it.

    Raises:
        UserError: if the data cannot be prepared, or does not fit the model.
    """
    options.data.block_size = options.model.config.block_size
    if weights.header is not None:
        _write_only_where_asked(options.data, weights.asked_data)
    data, trained_with = TokenDataModule(**options.data.as_dict()), weights.tokenizer
    if trained_with is not None and options.data.get("format", "text") != "text":
        trained_with = with_chat_template(trained_with)
    decide_once("data", lambda: _prepare(data, trained_with), seconds=None)
    data.load_tokenizer(trained_with)
    if subcommand == "fit":
        data.check_training()
    if subcommand == "fit" and weights.source is not None:
        grown = _grown_vocabulary(options.data.path, weights.source, data.tokenizer)
        resolve_grown_vocabulary(options, weights.source.config, grown)
    elif weights.tokenizer is not None and data.tokenizer is not None:
        _check_vocabulary(options.data.path, weights.tokenizer, data.tokenizer)
    if data.tokenizer is not None:
        _resolve_vocabulary(options, weights, data.tokenizer, default_vocab_size)
    return data.tokenizer


def _write_only_where_asked(data: Namespace, asked: frozenset[str]) -> None:
    """A checkpoint may come from anyone: what it names is read, and written to only if the user has named it, too.

    Args:
        data: the options, changed in place: a cache that only the checkpoint names is used if it has been before.
        asked: which of them the user has named.

    Raises:
        UserError: shards would have to be made in a folder that only the checkpoint names.
    """
    path, cache = data.path, data.cache_dir
    if path is None:
        return
    if is_remote(path):
        if cache is not None and "cache_dir" not in asked and not RemoteFolder(path, cache).folder.is_dir():
            note(f"{cache}, which the checkpoint names, holds no shards of {path}: the default cache is used")
            data.cache_dir = None
    elif "path" not in asked and not is_prepared(path):
        raise UserError(
            f"{path}, which the checkpoint names, has no token shards: give --data.path FOLDER, and --data.source TEXT "
            "to make them there"
        )


def _prepare(data: TokenDataModule, trained_with: Tokenizer | None) -> str:
    """Prepare the data, with the tokenizer that the model was trained with unless another is named."""
    if data.spec is not None or trained_with is None:
        data.prepare_data()
        return "ready"
    with TemporaryDirectory() as folder:
        data.spec = str(Path(folder) / "tokenizer.json")
        trained_with.save(data.spec)
        data.prepare_data()
    data.spec = None
    return "ready"


def _check_vocabulary(path: str, trained_with: Tokenizer, tokenizer: Tokenizer) -> None:
    """Refuse data whose tokenizer is not the model's. Raises UserError."""
    new_ids = new_special_ids(tokenizer, trained_with)
    if new_ids is None:
        raise UserError(
            f"{path} holds shards of the tokenizer {tokenizer.name} ({tokenizer.hash[:12]}), the "
            f"model was trained with {trained_with.name} ({trained_with.hash[:12]}): prepare the text with the "
            f"model's tokenizer in another folder"
        )
    if new_ids:
        raise UserError(
            f"{path} has special tokens that the model lacks ({_new_names(tokenizer, trained_with)}): start a new run "
            f"with fit --init_from, which adds them to a model"
        )


def _grown_vocabulary(path: str, source: SourceCheckpoint, tokenizer: Tokenizer | None) -> GPTConfig:
    """The shape of a model that starts from `source`: with ids for the special tokens that only its data has.

    Raises:
        UserError: if the data's tokenizer is another.
    """
    if tokenizer is None or source.tokenizer is None:
        return source.config
    if not new_special_ids(tokenizer, source.tokenizer):
        _check_vocabulary(path, source.tokenizer, tokenizer)
        return source.config
    if is_rank_zero():
        note(f"new special tokens: {_new_names(tokenizer, source.tokenizer)}; their rows begin as the mean of all")
    return grown_config(source.config, tokenizer.n_vocab)


def _new_names(tokenizer: Tokenizer, base: Tokenizer) -> str:
    return ", ".join(name for name in tokenizer.specials if name not in base.specials)


def _resolve_vocabulary(
    options: Namespace, weights: ExistingWeights, tokenizer: Tokenizer, default_vocab_size: int
) -> None:
    """A new model gets the data's vocabulary; one that exists must have its ids."""
    config = options.model.config
    if weights.config is None and config.vocab_size == default_vocab_size:
        config.vocab_size = tokenizer.n_vocab
    if config.vocab_size < tokenizer.n_vocab:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, the model's vocab_size is "
            f"{config.vocab_size}: leave vocab_size out"
        )


def initial_weights(source: SourceCheckpoint, config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Tensor]:
    """The weights that a model of shape `config` starts from, with rows for the special tokens that `source` lacks.

    Args:
        source: what `--init_from` names.
        config: of the model, as resolved.
        tokenizer: of the data, if it has one.
    """
    weights = source.load().state_dict()
    if tokenizer is None or source.tokenizer is None:
        return weights
    new_ids = new_special_ids(tokenizer, source.tokenizer)
    known = min(source.tokenizer.n_vocab, source.config.vocab_size)
    return grow_weights(weights, config, known, new_ids) if new_ids else weights


# Precision and compilation -------------------------------------------------------------------------------------------


def resolve_precision_option(subcommand: str, options: Namespace, weights: ExistingWeights) -> Decision:
    """Replace `precision: auto` by what suits this machine and model; a run goes on, and is judged, in its own.

    Returns:
        The precision with its reason, and on the rank that timed it with the timings.
    """
    trainer, header = options.trainer, weights.header
    if subcommand == "predict":
        trainer.precision = "32-true"  # `--precision` says how the weights are held; the other one is refused above
    if header is not None and header.precision is not None and trainer.precision in ("auto", None):
        trainer.precision = header.precision
    if trainer.precision == "auto" and subcommand != "fit":
        trainer.precision = "32-true"
    if trainer.precision != "auto":
        return Decision(trainer.precision, "as asked for")
    decision = _decide_precision(options)
    trainer.precision = decision.precision
    if is_rank_zero():
        note(str(decision))
    return decision


def _decide_precision(options: Namespace) -> Decision:
    """The decision of rank 0, elsewhere without its timings."""
    here: list[Decision] = []

    def decide() -> str:
        here.append(
            resolve_precision(
                "auto",
                GPTConfig.from_dict(options.model.config.as_dict()),
                _rows(options),
                accelerator=options.trainer.accelerator,
                activation_checkpointing=options.model.activation_checkpointing,
            )
        )
        return f"{here[0].precision}: {here[0].reason}"

    precision, reason = decide_once("precision", decide).split(": ", 1)
    return Decision(precision, reason, here[0].timings if here else ())


def resolve_compile_option(subcommand: str, options: Namespace, decision: Decision) -> None:
    """Replace `compile: auto` of a `fit` by whether it makes this run faster.

    Args:
        subcommand: its name.
        options: of the subcommand, changed in place; its precision is resolved.
        decision: about the precision, with a timing of the step without `torch.compile` if there is one.
    """
    if subcommand != "fit" or options.model.compile != "auto":
        return
    verdict, timing = decide_once("compile", lambda: _decide_compile(options, decision)).split(": ", 1)
    options.model.compile = verdict == "on"
    if timing and is_rank_zero():
        note(f"compile {verdict}: {timing}")


def _decide_compile(options: Namespace, decision: Decision) -> str:
    trainer, rows = options.trainer, _rows(options)
    config = GPTConfig.from_dict(options.model.config.as_dict())
    run_tokens = max(0, trainer.max_steps) * trainer.accumulate_grad_batches * rows * config.block_size
    is_faster, timing = resolve_compile(
        config,
        trainer.precision,
        rows,
        run_tokens,
        next((timing for timing in decision.timings if timing.precision == trainer.precision), None),
        trainer.accelerator,
        options.model.activation_checkpointing,
        math.inf if trainer.max_time is None else parse_duration(trainer.max_time).total_seconds(),
    )
    return f"{'on' if is_faster else 'off'}: {timing}"


def _rows(options: Namespace) -> int:
    """Rows of one rank's micro-batch."""
    return max(1, options.data.batch_size // rank_count(options.trainer))
