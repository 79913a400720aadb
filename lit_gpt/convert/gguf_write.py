"""A model as a GGUF file for llama.cpp, Ollama and their relatives, written tensor by tensor."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from lit_gpt.console.messages import note
from lit_gpt.convert.gguf_architectures import ROPE_FACTORS, GgufModel, describe, heads_of, rope_factors, to_pairs
from lit_gpt.convert.gguf_format import GgufTensor, pack_header, padding
from lit_gpt.convert.gguf_tokenizer import describe_tokenizer
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.weights import StoredTensor, model_shapes, to_their_names
from lit_gpt.convert.write import check_absent, with_notes
from lit_gpt.errors import UserError, nearest
from lit_gpt.files.atomic import atomic_write

_FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_OTHER_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
GGUF_DTYPES = (*_FILE_TYPES, *_OTHER_NAMES)
"""What `dtype` of `write_gguf` may be."""
_ALWAYS_F32 = "position_embd.weight"
_READS_AND_WRITES_IDS = ("token_embd.weight", "output.weight")
_QUANTISATION_VERSION = 2


def write_gguf(source: SourceCheckpoint, path: Path, dtype: str | None = None) -> None:
    """One file that llama.cpp runs, with the tokenizer inside.

    Args:
        source: the model; each of its tensors is read when its turn comes.
        path: the file, which must not be there.
        dtype: of the matrices: one of `GGUF_DTYPES`; None for the one of f32, f16 and bf16 that most of the source's
            tensors have. Vectors and the table of positions are f32. With `q4_0` the matrices that read and write ids
            are q8_0: a tied one is both, and four bits cost it more than all the others together.

    Raises:
        UserError: if `path` exists, the dtype is unknown, or llama.cpp does not compute such a model, or would give its
            tokenizer's texts other ids.
    """
    check_absent(path)
    wanted = _resolve_dtype(source, dtype)
    model = describe(source.config, source.name)
    tokenizer = describe_tokenizer(source.tokenizer, source.config.vocab_size, source.name)
    tensors = _their_tensors(model, source)
    kinds = {name: _kind_of(name, stored.shape, _FILE_TYPES[wanted][0]) for name, stored in tensors.items()}
    _note_wide_rows(kinds, wanted)
    metadata: dict[str, Any] = {
        "general.architecture": model.name,
        "general.type": "model",
        "general.name": path.stem.encode("utf-8", "replace").decode(),
        "general.file_type": int(_FILE_TYPES[wanted][1]),
        "general.quantization_version": _QUANTISATION_VERSION,
        **model.metadata,
        **tokenizer,
    }
    with atomic_write(path) as file:
        file.write(pack_header(metadata, _laid_out(tensors, kinds)))
        for name, stored in with_notes(tensors):
            data = _encoded(name, stored, kinds[name])
            file.write(data)
            file.write(padding(len(data)))


def _resolve_dtype(source: SourceCheckpoint, dtype: str | None) -> str:
    if dtype is None:
        dtypes = [stored.dtype for stored in source.weights.values()]
        dtype = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
        if dtype == "float64":
            raise UserError(f"{source.name} has weights of 64 bits, which llama.cpp has not: choose --dtype f32")
    dtype = _OTHER_NAMES.get(dtype, dtype)
    if dtype not in _FILE_TYPES:
        raise UserError(f'dtype "{dtype}" is none that GGUF is written in: {nearest(dtype, _FILE_TYPES)}')
    return dtype


def _their_tensors(model: GgufModel, source: SourceCheckpoint) -> dict[str, StoredTensor]:
    """All tensors of the file by their names; biases that llama.cpp wants and our model has not are zero."""
    weights = source.weights  # of which the plan takes only the rows of the vocabulary
    zeros = {
        name: StoredTensor(shape, torch.float32, partial(torch.zeros, shape))
        for name, shape in model_shapes(model.config).items()
        if name not in weights
    }
    result = {}
    factors = rope_factors(model.config)
    if factors is not None:
        result[ROPE_FACTORS] = StoredTensor(tuple(factors.shape), factors.dtype, factors.clone)
    for name, stored in to_their_names(model.plan(), weights | zeros).items():
        heads = heads_of(name, model.name, model.config)
        result[name] = stored if heads is None else to_pairs(stored, heads)
    return result


def _kind_of(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor in a file of this type, as llama.cpp's own tools choose it."""
    if len(shape) == 1 or name == _ALWAYS_F32:
        return GGMLQuantizationType.F32
    if wanted is GGMLQuantizationType.Q4_0 and name in _READS_AND_WRITES_IDS:
        wanted = GGMLQuantizationType.Q8_0
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _note_wide_rows(kinds: dict[str, GGMLQuantizationType], wanted: str) -> None:
    if not wanted.startswith("q"):
        return
    kept = [name for name, kind in kinds.items() if kind is GGMLQuantizationType.F16]
    if kept:
        patterns = sorted({re.sub(r"\d+", "*", name) for name in kept})
        note(f"{len(kept)} tensors stay in f16, since their rows are no multiple of 32: {', '.join(patterns)}")


def _laid_out(tensors: dict[str, StoredTensor], kinds: dict[str, GGMLQuantizationType]) -> list[GgufTensor]:
    """Where each tensor lies after the header, one after another."""
    result, start = [], 0
    for name, stored in tensors.items():
        tensor = GgufTensor(name, stored.shape, kinds[name], start)
        result.append(tensor)
        start += tensor.nbytes + len(padding(tensor.nbytes))
    return result


def _encoded(name: str, stored: StoredTensor, kind: GGMLQuantizationType) -> memoryview:
    """The bytes of one tensor."""
    tensor = stored.read()
    if tensor.shape != stored.shape or tensor.dtype != stored.dtype:
        raise UserError("the source changed while it was read: convert it again")
    values = tensor.to(torch.float32).contiguous().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        data = quants.quantize(values, kind)
    if kind is GGMLQuantizationType.F16 and not np.isfinite(data).all() and np.isfinite(values).all():
        raise UserError(f"{name} has numbers above 65504, the largest of f16: choose --dtype bf16 or f32")
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
