"""GGUF files, in: the model, dequantised, and its tokenizer; the header is checked before anything is read."""

from __future__ import annotations

import re
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from lit_gpt.checkpoint.extents import Extent, ExtentReader
from lit_gpt.checkpoint.limits import check_fits
from lit_gpt.convert.gguf_architectures import (
    ROPE_FACTORS,
    GgufModel,
    from_pairs,
    heads_of,
    read_hints,
    read_model,
    tensor_plan,
)
from lit_gpt.convert.gguf_format import GgufTensor, read_header
from lit_gpt.convert.gguf_tokenizer import read_vocabulary
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.weights import StoredTensor, to_our_names
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import Tokenizer

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def open_gguf(path: Path, tokenizer: Tokenizer | None) -> SourceCheckpoint:
    """A GGUF file of GPT-2, Llama, Qwen2 or Qwen3 in F32, F16, BF16, Q8_0 or Q4_0; its weights are read as float32.

    Args:
        path: the file.
        tokenizer: the user's choice; None for the file's own.

    Raises:
        UserError: if the file is damaged, describes what this project does not do (naming it), or its metadata and its
            tensors contradict each other.
    """
    where = str(path)
    header = read_header(path)
    reader = ExtentReader(path)
    stored = {name: _stored(reader, tensor) for name, tensor in header.tensors.items()}
    model = read_model(header.metadata, stored, where)
    check_fits(model.config, [tensor.shape for tensor in stored.values()], where)
    if tokenizer is None:
        tokenizer = read_vocabulary(header.metadata, model.config.vocab_size, where, path.stem)
    elif tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {tokenizer.n_vocab - 1}, the model {model.config.vocab_size}: "
            "use the tokenizer that belongs to the model"
        )
    stored.pop(ROPE_FACTORS, None)  # its scaling is in the config
    for name, tensor in stored.items():
        heads = heads_of(name, model.name, model.config) if _is_of_block(name) else None
        stored[name] = tensor if heads is None or tensor.shape[0] % (2 * heads) else from_pairs(tensor, heads)
    config, stored = _without_zero_biases(model, stored, where)
    plan = tensor_plan(model.name, config)
    weights = to_our_names(config, plan, stored, where, tied_head="output.weight")
    return SourceCheckpoint(where, f"GGUF ({model.name})", config, tokenizer, weights, plan)


def _is_of_block(name: str) -> bool:
    return re.fullmatch(r"blk\.\d+\.\w+\.(weight|bias)", name) is not None


def _stored(reader: ExtentReader, tensor: GgufTensor) -> StoredTensor:
    if tensor.kind in _PLAIN:
        blank = torch.empty(tensor.shape, dtype=_PLAIN[tensor.kind], device="meta")
        extent = Extent.of(blank, tensor.start)
        plain = StoredTensor(tensor.shape, blank.dtype, partial(reader.read, extent), extent)
        return plain.to(torch.float32)
    extent = Extent.of(torch.empty(tensor.nbytes, dtype=torch.uint8, device="meta"), tensor.start)
    return StoredTensor(tensor.shape, torch.float32, partial(_dequantised, reader, extent, tensor))


def _dequantised(reader: ExtentReader, extent: Extent, tensor: GgufTensor) -> Tensor:
    data = reader.read(extent).numpy().reshape(prod(tensor.shape[:-1]), -1)
    with np.errstate(all="ignore"):  # of damaged blocks, whose numbers may be infinite
        values = quants.dequantize(data, tensor.kind)
    return torch.from_numpy(values.reshape(tensor.shape))


def _without_zero_biases(
    model: GgufModel, stored: dict[str, StoredTensor], where: str
) -> tuple[GPTConfig, dict[str, StoredTensor]]:
    """What we wrote comes back as it was: without the biases that llama.cpp wants, if they are still zero."""
    bare = read_hints(model, where)
    if bare is None:
        return model.config, stored
    check_fits(bare, [tensor.shape for tensor in stored.values()], where)
    wanted = {name for entry in tensor_plan(model.name, bare) for name in entry.theirs}
    extra = [name for entry in model.plan() for name in entry.theirs if name not in wanted]
    if any(name in stored and stored[name].read().count_nonzero() for name in extra):
        return model.config, stored
    return bare, {name: tensor for name, tensor in stored.items() if name not in extra}
