"""`lit_gpt info`: parameters, tensors, memory and FLOPs of a model, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lit_gpt.console.options import CommandParser
from lit_gpt.errors import UserError, nearest
from lit_gpt.insight.info.describe import ModelInfo, Subject, describe, dtype_name
from lit_gpt.insight.info.parts import count_parts
from lit_gpt.insight.info.shapes import walk_shapes
from lit_gpt.insight.info.source_names import source_tensors
from lit_gpt.insight.info.table import print_hardware, print_info, print_parts, print_shapes, print_source_tensors
from lit_gpt.model.config import PRESETS, GPTConfig

# Sources of the shape ------------------------------------------------------------------------------------------


def subject_from_preset(preset: str) -> Subject:
    """A named shape. Raises UserError, with the nearest right name, when there is none."""
    return Subject(f"preset {preset}", GPTConfig.from_preset(preset))


def subject_from_checkpoint(path: str) -> Subject:
    """A checkpoint of ours, without reading its weights; `last` and `best` are the newest run's.

    That of an adapter is described as the model that it makes of its base.

    Raises:
        UserError: if there is none, or it is no checkpoint.
    """
    from lit_gpt.checkpoint.format import header_of, load_checkpoint, resolve_ckpt_path

    file = resolve_ckpt_path(path)
    checkpoint = load_checkpoint(file, "meta")
    header = header_of(checkpoint, file)
    if header.adapter is not None:
        return subject_from_source(str(file))
    dtypes = {name.removeprefix("model."): dtype_name(tensor) for name, tensor in checkpoint["state_dict"].items()}
    values = header.hyper_parameters
    training = {
        "batch_size": header.data.get("batch_size"),
        "precision": header.precision,
        "optimizer": (values.get("optimizer") or {}).get("name"),
        "activation_checkpointing": values.get("activation_checkpointing"),
    }
    return Subject(str(file), header.config, _known(training), dtypes)


def subject_from_source(source: str, n_head: int | None = None) -> Subject:
    """A model of another project, as `lit_gpt convert` reads it. Raises UserError if it is none.

    Args:
        source: as for `open_source`.
        n_head: number of heads, where the source does not say.
    """
    from lit_gpt.convert.recognise import open_source

    opened = open_source(source, None, n_head, "lit_gpt info --n_head N")
    return Subject(source, opened.config, tensors=source_tensors(opened.plan))


def subject_from_config(path: str) -> Subject:
    """A YAML file: one that `lit_gpt fit` takes, or a bare mapping of `GPTConfig`'s fields (and `preset`).

    Raises:
        UserError: if it is missing, no mapping, or describes no model.
    """
    values = _read_yaml(path)
    if "model" not in values:
        if {"trainer", "data"} & values.keys():
            raise UserError(f'{path} has no "model" section: give --preset, or add one')
        return Subject(path, _shape(values, None, path))
    model, data, trainer = (values.get(name) or {} for name in ("model", "data", "trainer"))
    shape = {**(model.get("config") or {}), **({"preset": model["preset"]} if model.get("preset") else {})}
    training = {
        "batch_size": data.get("batch_size"),
        "precision": trainer.get("precision"),
        "optimizer": (model.get("optimizer") or {}).get("name"),
        "accumulate_grad_batches": trainer.get("accumulate_grad_batches"),
        "activation_checkpointing": model.get("activation_checkpointing"),
    }
    return Subject(path, _shape(shape, _vocabulary(data), path), _known(training))


def _shape(values: dict[str, Any], vocabulary: int | None, path: str) -> GPTConfig:
    rest = {name: value for name, value in values.items() if name != "preset"}
    if vocabulary is not None and rest.get("vocab_size") is None:
        rest["vocab_size"] = vocabulary
    try:
        if values.get("preset"):
            return GPTConfig.from_preset(values["preset"], **rest)
        return GPTConfig.from_dict(rest)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _vocabulary(data: dict[str, Any]) -> int | None:
    """The number of ids that `fit` will find: the prepared folder's tokenizer, else the named one; None if unknown.

    Characters are counted when the text is prepared, so their number is not known before that.
    """
    from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, is_trained

    folder, spec = data.get("path"), data.get("tokenizer")
    if folder and (Path(folder) / TOKENIZER_FILE).is_file():
        return Tokenizer.load(folder).n_vocab
    if not spec:
        return None
    if is_trained(spec):
        return int(spec[4:]) if spec.startswith("bpe:") else None
    return get_tokenizer(spec).n_vocab


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} holds no mapping: give one that `lit_gpt fit` takes, or GPTConfig's fields")
    return values


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# The program ---------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int | None:
    """`lit_gpt info`."""
    args = _parser().parse_args(argv)
    sources = {name: args[name] for name in _SOURCES if args[name] is not None}
    _check(args, sources)
    results: dict[str, Any] = {}
    views: list[Callable[[], None]] = []
    for name, value in sources.items():
        subject = subject_from_source(value, args.n_head) if name == "init_from" else _SOURCES[name](value)
        info = describe(subject, **{name: args[name] for name in _SETTINGS})
        details, views = _details(args, subject, info)
        results = {**info.to_dict(), **details}
        views = views or [partial(print_info, info)]
    if args.hardware:
        from lit_gpt.train.hardware import hardware_table

        results["hardware"] = dict(hardware_table())
        views.append(partial(print_hardware, results["hardware"]))
    if args.format == "json":
        print(json.dumps(results, indent=1))
        return 0
    for view in views:
        view()
    return 0


def _check(args: Any, sources: dict[str, str]) -> None:
    """Refuse options that do not go together. Raises UserError."""
    for name, known in (("format", ("table", "json")), ("by", ("tensor", "part")), ("names", ("lit_gpt", "source"))):
        if args[name] not in known:
            raise UserError(f"{name} {args[name]!r} is unknown: {nearest(args[name], known)}")
    if len(sources) != 1 and not (args.hardware and not sources):
        raise UserError(
            f"give one of --preset, --config, --ckpt_path and --init_from, not {len(sources)}: presets are {_presets()}"
        )
    for flag, wanted in (
        (f"--n_head {args.n_head}", args.n_head is not None),
        ("--names source", args.names == "source"),
    ):
        if wanted and args.init_from is None:
            raise UserError(f"{flag} is for --init_from: leave it out, or name the source there")


def _details(args: Any, subject: Subject, info: ModelInfo) -> tuple[dict[str, Any], list[Callable[[], None]]]:
    """What --by part, --shapes and --names source ask for: plain values, and the tables in place of the usual ones."""
    details: dict[str, Any] = {}
    views: list[Callable[[], None]] = []
    if args.by == "part":
        count = count_parts(info.config, info.tensors)
        details["parts"] = count.to_dict()
        views.append(partial(print_parts, info, count))
    if args.shapes:
        steps = walk_shapes(info.config, info.settings["batch_size"], info.settings["context"])
        details["shapes"] = [vars(step) for step in steps]
        views.append(partial(print_shapes, info, steps))
    if args.names == "source":
        details["source_tensors"] = [vars(tensor) for tensor in subject.tensors]
        views.append(partial(print_source_tensors, subject))
    return details, views


_SOURCES: dict[str, Callable[[str], Subject]] = {
    "preset": subject_from_preset,
    "config": subject_from_config,
    "ckpt_path": subject_from_checkpoint,
    "init_from": subject_from_source,
}
_SETTINGS = (
    "batch_size",
    "context",
    "precision",
    "optimizer",
    "accumulate_grad_batches",
    "activation_checkpointing",
)


def _presets() -> str:
    return ", ".join(PRESETS)


def _parser() -> Any:
    # `--config` is the model to describe here, not a file of this command's options.
    parser = CommandParser(
        prog="lit_gpt info",
        description="Parameters, shapes, memory and FLOPs of a checkpoint, a configuration or a preset.",
        default_env=True,
        env_prefix="LIT_GPT_INFO_",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", type=str | None, help=f"a named shape: {_presets()}")
    parser.add_argument("--config", type=str | None, help="a YAML file for `lit_gpt fit`, or of GPTConfig's fields")
    parser.add_argument("--ckpt_path", type=str | None, help="a checkpoint, or last or best")
    parser.add_argument(
        "--init_from", type=str | None, help="what `lit_gpt convert` reads: a Hugging Face folder or id"
    )
    parser.add_argument("--n_head", type=int | None, help="heads of --init_from, where its file does not say")
    parser.add_argument("--format", type=str, default="table", help="table or json")
    parser.add_argument("--by", type=str, default="tensor", help="tensor, or part: the count by part with its sums")
    parser.add_argument("--shapes", action="store_true", help="a batch's shapes on its way through every layer")
    parser.add_argument(
        "--names", type=str, default="lit_gpt", help="lit_gpt, or source: the names in --init_from's own file"
    )
    parser.add_argument("--hardware", action="store_true", help="what `precision: auto` decides by on this machine")
    parser.add_argument("--batch_size", type=int | None, help="sequences of a micro-batch, for the training memory")
    parser.add_argument("--context", type=int | None, help="tokens of a sequence; the model's block_size if left out")
    parser.add_argument("--precision", type=str | None, help="of training: 32-true, bf16-mixed, …")
    parser.add_argument("--optimizer", type=str | None, help="adamw or muon")
    parser.add_argument("--accumulate_grad_batches", type=int | None, help="micro-batches of an optimizer step")
    parser.add_argument("--activation_checkpointing", type=bool | None, help="keep one activation per block")
    return parser
