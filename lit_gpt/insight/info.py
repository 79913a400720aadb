"""`lit_gpt info`: what a model is made of and what it will cost, before a single weight exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_gpt.cache import KVCache
from lit_gpt.command import CommandParser
from lit_gpt.config import PRESETS, GPTConfig
from lit_gpt.errors import UserError, nearest
from lit_gpt.insight.memory import TrainingMemory, check_precision, training_memory
from lit_gpt.model import GPT
from lit_gpt.precision import device_type, resolve_precision

_EMBEDDINGS = ("wte.weight", "wpe.weight", "lm_head.weight")


@dataclass(frozen=True)
class Subject:
    """What is described: its shape, how it is trained where that is known, and the dtypes that its file holds."""

    source: str
    config: GPTConfig
    training: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shared_with` names the one that it is the same as, and it is then not counted again."""

    name: str
    shape: tuple[int, ...]
    count: int
    dtype: str
    shared_with: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Everything that `lit_gpt info` says of one model. Sizes in bytes, FLOPs as `GPTConfig.forward_flops_per_token`.

    Attributes:
        source: where it comes from.
        config: its shape.
        tensors: all of them, in the order of `GPT.state_dict`.
        settings: batch, context, precision and optimizer that `training` is for.
        training: memory of a training step.
        serving: weights and cache by dtype.
        flops: per token and per training step at the context in `settings`.
    """

    source: str
    config: GPTConfig
    tensors: list[TensorInfo]
    settings: dict[str, Any]
    training: TrainingMemory
    serving: dict[str, dict[str, int]]
    flops: dict[str, float]

    @property
    def total(self) -> int:
        """Parameters, shared ones once."""
        return sum(tensor.count for tensor in self.tensors if tensor.shared_with is None)

    @property
    def without_embeddings(self) -> int:
        """Parameters in the blocks and the last norm: neither embedding, nor positions, nor head."""
        outside = sum(
            tensor.count for tensor in self.tensors if tensor.name in _EMBEDDINGS and tensor.shared_with is None
        )
        return self.total - outside

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--format json` prints them."""
        return {
            "source": self.source,
            "config": self.config.to_dict(),
            "parameters": {"total": self.total, "without_embeddings": self.without_embeddings},
            "flops": self.flops,
            "training": {**self.settings, "memory": self.training.to_dict()},
            "serving": self.serving,
            "tensors": [vars(tensor) for tensor in self.tensors],
        }


class _LeaveUninitialised(TorchFunctionMode):
    """On the meta device there is nothing to fill, and torch's way of not filling it imports its compiler: 1 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def tensors_of(config: GPTConfig, dtypes: dict[str, str] | None = None) -> list[TensorInfo]:
    """Every tensor of the model, built on the meta device: no memory, whatever its size."""
    with torch.device("meta"), _LeaveUninitialised():
        model = GPT(config)
    first: dict[int, str] = {}
    rows = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        dtype = (dtypes or {}).get(name, _dtype_name(parameter))
        shared = None if owner == name else owner
        rows.append(TensorInfo(name, tuple(parameter.shape), parameter.numel(), dtype, shared))
    return rows


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe(subject: Subject, **settings: Any) -> ModelInfo:
    """Count and estimate.

    Args:
        subject: what to describe.
        settings: `batch_size`, `context`, `precision`, `optimizer`, `accumulate_grad_batches`,
            `activation_checkpointing`; those that are None come from the subject, then from the defaults.

    Raises:
        UserError: for a setting out of range.
    """
    config = subject.config
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = {**_DEFAULTS, "context": config.block_size, **subject.training, **given}
    chosen["precision"] = _precision(str(chosen["precision"]), config)
    tensors = tensors_of(config, subject.dtypes)
    own = [tensor for tensor in tensors if tensor.shared_with is None]
    total = sum(tensor.count for tensor in own)
    matrices = sum(tensor.count for tensor in own if tensor.name.startswith("h.") and len(tensor.shape) == 2)
    memory = training_memory(config, total, matrices, **chosen, device=device_type())
    forward = config.forward_flops_per_token(chosen["context"])
    flops = {
        "forward_per_token": forward,
        "training_per_token": 3 * forward,
        "training_per_micro_batch": 3 * forward * chosen["batch_size"] * chosen["context"],
    }
    return ModelInfo(subject.source, config, tensors, chosen, memory, _serving(config, total), flops)


_DEFAULTS: dict[str, Any] = {
    "batch_size": 8,
    "precision": "auto",
    "optimizer": "adamw",
    "accumulate_grad_batches": 1,
    "activation_checkpointing": False,
}


def _precision(requested: str, config: GPTConfig) -> str:
    """`auto` is not timed here, as `fit` does on a CPU that could do either: it stands for fp32 there."""
    if requested == "auto" and device_type() == "cpu":
        return "32-true"
    return check_precision(resolve_precision(requested, config, 1).precision)


def _serving(config: GPTConfig, total: int) -> dict[str, dict[str, int]]:
    """For each dtype: weights, cache of one token, cache of one slot of `block_size` tokens."""
    figures = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        figures[name] = {
            "weights": total * dtype.itemsize,
            "cache_per_token": KVCache.bytes_per_row(config, 1, dtype),
            "cache_per_slot": KVCache.bytes_per_row(config, config.block_size, dtype),
        }
    return figures


# Where the shape comes from ------------------------------------------------------------------------------------------


def subject_from_preset(preset: str) -> Subject:
    """A named shape. Raises UserError, with the nearest right name, when there is none."""
    return Subject(f"preset {preset}", GPTConfig.from_preset(preset))


def subject_from_checkpoint(path: str) -> Subject:
    """A checkpoint of ours, without reading its weights; `last` and `best` are the newest run's.

    Raises:
        UserError: if there is none, or it is no checkpoint.
    """
    from lit_gpt.checkpoint import load_checkpoint, read_header, resolve_ckpt_path

    file = resolve_ckpt_path(path)
    header = read_header(file)
    state = load_checkpoint(file, "meta")["state_dict"]
    dtypes = {name.removeprefix("model."): _dtype_name(tensor) for name, tensor in state.items()}
    values = header.hyper_parameters
    training = {
        "batch_size": header.data.get("batch_size"),
        "precision": header.precision,
        "optimizer": (values.get("optimizer") or {}).get("name"),
        "activation_checkpointing": values.get("activation_checkpointing"),
    }
    return Subject(str(file), header.config, _known(training), dtypes)


def subject_from_source(source: str) -> Subject:
    """A model of another project, as `lit_gpt convert` reads it. Raises UserError if it is none."""
    from lit_gpt.convert import open_source

    return Subject(source, open_source(source).config)


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
    from lit_gpt.tokenizer import FILE_NAME, Tokenizer, get_tokenizer, is_trained

    folder, spec = data.get("path"), data.get("tokenizer")
    if folder and (Path(folder) / FILE_NAME).is_file():
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
    from lit_gpt.insight.info_table import print_hardware, print_info

    args = _parser().parse_args(argv)
    sources = {name: args[name] for name in _SOURCES if args[name] is not None}
    if args.format not in ("table", "json"):
        raise UserError(f"format {args.format!r} is unknown: {nearest(args.format, ['table', 'json'])}")
    if len(sources) != 1 and not (args.hardware and not sources):
        raise UserError(
            f"give one of --preset, --config, --ckpt_path and --init_from, not {len(sources)}: presets are {_presets()}"
        )
    results: dict[str, Any] = {}
    if args.hardware:
        from lit_gpt.precision import hardware_table

        results["hardware"] = dict(hardware_table())
    if sources:
        name, value = sources.popitem()
        subject = _SOURCES[name](value)
        info = describe(subject, **{name: args[name] for name in _SETTINGS})
        results = {**info.to_dict(), **results}
    if args.format == "json":
        print(json.dumps(results, indent=1))
        return 0
    if sources or "source" in results:
        print_info(info)
    if args.hardware:
        print_hardware(results["hardware"])
    return 0


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
    parser.add_argument("--format", type=str, default="table", help="table or json")
    parser.add_argument("--hardware", action="store_true", help="what `precision: auto` looks at on this machine")
    parser.add_argument("--batch_size", type=int | None, help="sequences of a micro-batch, for the training memory")
    parser.add_argument("--context", type=int | None, help="tokens of a sequence; the model's block_size if left out")
    parser.add_argument("--precision", type=str | None, help="of training: 32-true, bf16-mixed, …")
    parser.add_argument("--optimizer", type=str | None, help="adamw or muon")
    parser.add_argument("--accumulate_grad_batches", type=int | None, help="micro-batches of an optimizer step")
    parser.add_argument("--activation_checkpointing", type=bool | None, help="keep one activation per block")
    return parser
