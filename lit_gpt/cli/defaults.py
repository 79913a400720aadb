"""Existing weights that the command line names, and the parser defaults that they or a preset imply."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from lit_gpt.checkpoint.format import Header, read_header, resolve_ckpt_path
from lit_gpt.checkpoint.frozen import PREFIX
from lit_gpt.cli.adapters import find_base
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig, preset_values
from lit_gpt.tokenizer.tokenizer import Tokenizer

_FREE_KEYS = {"dropout", "attn_dropout"}
"""Keys of the model's config that a checkpoint does not determine: they shape the training, not the weights."""
_VOCABULARY_KEYS = {"vocab_size", "padded_vocab_size"}
"""Those that `fit --init_from` may raise, for special tokens of its data: checked when the data is known."""


@dataclass(frozen=True)
class ExistingWeights:
    """The weights that the command line names, none of them read yet; neither is set for a new model.

    Attributes:
        header: of the checkpoint in `--ckpt_path`.
        source: what `--init_from` names.
        base: of the adapter in `--ckpt_path`, if it is one.
        asked_data: which of the data's folders and inputs the user has named, and not the checkpoint alone.
    """

    header: Header | None = None
    source: SourceCheckpoint | None = None
    base: SourceCheckpoint | None = None
    asked_data: frozenset[str] = frozenset()

    @property
    def config(self) -> GPTConfig | None:
        """The model's shape, None for a new model."""
        origin = self.header or self.source
        return None if origin is None else origin.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What the model was trained with, None for a new model or one of bare ids."""
        if self.source is not None:
            return self.source.tokenizer
        if self.header is not None and self.header.tokenizer is not None:
            return Tokenizer.from_dict(self.header.tokenizer)
        return None


def find_weights(subcommand: str, options: Namespace) -> ExistingWeights:
    """The weights that `options` names for `subcommand`.

    Raises:
        UserError: if it names two, or none where the subcommand needs some, or they cannot be read.
    """
    if options.n_head is not None and not options.init_from:
        raise UserError(f"--n_head {options.n_head} is for --init_from: leave it out, or name the source there")
    if options.ckpt_path:
        if subcommand == "fit" and str(options.ckpt_path).startswith(PREFIX):
            raise UserError(
                f"--ckpt_path {options.ckpt_path} has no state of a run to go on with: start from it with "
                f"--init_from {options.ckpt_path}"
            )
        path = resolve_ckpt_path(options.ckpt_path, options.trainer.default_root_dir or ".")
        data = options.get("data") or Namespace()
        asked = frozenset(name for name in ("path", "cache_dir") if data.get(name) is not None)
        header = read_header(path)
        return ExistingWeights(header, base=find_base(header, options.init_from), asked_data=asked)
    if options.init_from:
        n_head_option = f"lit_gpt {subcommand} --n_head N"
        return ExistingWeights(source=open_source(options.init_from, None, options.n_head, n_head_option))
    if subcommand != "fit":
        raise UserError(f"{subcommand} needs a model: --ckpt_path PATH, --ckpt_path last, or --init_from SOURCE")
    return ExistingWeights()


def parser_defaults(weights: ExistingWeights, preset: str | None, known: list[str]) -> dict[str, Any]:
    """Defaults by the parser's dotted keys: of the weights, or of the preset where there are none.

    Args:
        weights: what the command line names.
        preset: a named shape.
        known: the keys that the parser has; what else a checkpoint says is left out.

    Raises:
        UserError: for an unknown preset.
    """
    if weights.header is not None:
        return _checkpoint_defaults(weights.header, known)
    if weights.source is not None:
        return _config_defaults(weights.source.config.to_dict())
    return {} if preset is None else _config_defaults(preset_values(preset))


def refuse_changed_model(subcommand: str, options: Namespace, weights: ExistingWeights) -> None:
    """With weights given, what they determine can't be overridden. Raises UserError, naming the key."""
    if weights.config is None:
        return
    may_grow = subcommand == "fit" and weights.source is not None
    free = _FREE_KEYS | _VOCABULARY_KEYS if may_grow else _FREE_KEYS
    _refuse_changed(options, weights.config, set(weights.config.to_dict()) - free)
    saved = None if weights.header is None else weights.header.precision
    if subcommand == "fit" and saved is not None and options.trainer.precision not in ("auto", saved):
        raise UserError(
            f"trainer.precision={options.trainer.precision} differs from the run's {saved}: leave it out to "
            f"go on with the run, or start a new one with --init_from"
        )


def resolve_grown_vocabulary(options: Namespace, source: GPTConfig, grown: GPTConfig) -> None:
    """Set the size of the vocabulary to that of `grown`; it may have been named, as in the config.yaml of such a run.

    Args:
        options: of the subcommand, changed in place.
        source: shape of the weights to start from.
        grown: the same with the ids that the data needs, if it needs more.

    Raises:
        UserError: if another size was asked for.
    """
    config = options.model.config
    for key in _VOCABULARY_KEYS:
        if config[key] == getattr(source, key):
            config[key] = getattr(grown, key)
    _refuse_changed(options, grown, _VOCABULARY_KEYS)


def _refuse_changed(options: Namespace, config: GPTConfig, keys: set[str]) -> None:
    """Raise UserError, naming the key, if one of `keys` is not as in `config`."""
    for key, value in config.to_dict().items():
        asked, left_out = options.model.config[key], dict[str, Any]({key: None})
        if asked is None and dataclasses.replace(config, **left_out) == config:
            continue  # what is left out is filled in, as when the run began: its config.yaml does not have it
        if key in keys and asked != value:
            raise UserError(
                f"model.config.{key}={asked} differs from the checkpoint's {value}: its weights have that shape; "
                f"leave the key out"
            )


def refuse_changed_run(subcommand: str, options: Namespace, weights: ExistingWeights) -> None:
    """A resumed run cannot be made shorter than it is, nor go on with another optimizer, whose state it lacks.

    Raises:
        UserError: naming the key. A run that is as long as it shall be is no error: there is nothing left to do.
    """
    header = weights.header
    if subcommand != "fit" or header is None:
        return
    for key, made, unit in (("max_steps", header.step, "optimizer steps"), ("max_epochs", header.epoch, "epochs")):
        limit = options.trainer[key]
        if limit is not None and 0 <= limit < made:
            raise UserError(
                f"trainer.{key}={limit}: the run of {header.path} has made {made} {unit} already; give at least that"
            )
    saved = (header.hyper_parameters.get("optimizer") or {}).get("name")
    asked = options.model.optimizer.name
    if saved is not None and asked != saved:
        raise UserError(
            f"model.optimizer.name={asked} differs from the run's {saved}: leave it out to go on with the run, or "
            f"start a new one with --init_from"
        )


def _checkpoint_defaults(header: Header, known: list[str]) -> dict[str, Any]:
    """What a checkpoint says about model and data."""
    values = _config_defaults(header.config.to_dict())
    lora = {} if header.adapter is None else {"lora": dataclasses.asdict(header.adapter.lora)}
    model = {**header.hyper_parameters, **lora, "config": {}, "preset": None}
    values |= _flatten({"model": model, "data": header.data})
    values["data.mixture"] = header.data.get("mixture")  # folders are no groups of options
    return {key: value for key, value in values.items() if key in known}


def _config_defaults(values: dict[str, Any]) -> dict[str, Any]:
    return {f"model.config.{key}": value for key, value in values.items()}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def refuse_missing_groups(options: Namespace, defaults: Namespace, within: str = "") -> None:
    """Refuse `model: null` and the like in a config file, which jsonargparse lets through.

    Args:
        options: as parsed; what was not asked for may be missing.
        defaults: of the same parser.
        within: the dotted name of the group that both are, and a dot.

    Raises:
        UserError: naming what should be a group of options.
    """
    for name, default in vars(defaults).items():
        if isinstance(default, Namespace):
            group = options.get(name, Namespace())
            if not isinstance(group, Namespace):
                shown = "null" if group is None else repr(group)
                raise UserError(f"{within}{name}: {shown} is no group of options: leave it out, or name its options")
            refuse_missing_groups(group, default, f"{within}{name}.")
