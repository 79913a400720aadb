"""Hugging Face folders: config, tokenizer, and the tensors of their safetensors, whose weights are read later."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lit_gpt.checkpoint.extents import Extent, ExtentReader
from lit_gpt.checkpoint.limits import check_fits
from lit_gpt.convert.hf_architectures import ARCHITECTURES, HINTS, read_config, tensor_plan
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.tokenizer_json import read_tokenizer
from lit_gpt.convert.weights import StoredTensor, to_our_names
from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.json_object import read_json
from lit_gpt.tokenizer.tokenizer import Tokenizer


def open_hf(
    folder: Path, name: str, tokenizer: Tokenizer | None, fetch_weights: Callable[[], None] | None = None
) -> SourceCheckpoint:
    """A Hugging Face folder.

    Args:
        folder: where `config.json` and the safetensors are.
        name: what the user called it.
        tokenizer: the user's choice; None for the folder's own.
        fetch_weights: called when all but the weights is known to be good: a model that is not supported should not be
            downloaded first.

    Raises:
        UserError: for a model or tokenizer that is not expressed here (naming the field), and for tensors that are
            missing, unexpected or misshapen (naming all).
    """
    values = read_json(folder / "config.json")
    config = read_config(values, f"{name}: config.json")
    if tokenizer is None:
        tokenizer = read_tokenizer(folder, values, name)
    if tokenizer is not None and tokenizer.n_vocab > config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has ids up to {tokenizer.n_vocab - 1}, but vocab_size in config.json is "
            f"{config.vocab_size}: use the tokenizer that belongs to the model"
        )
    if fetch_weights is not None:
        fetch_weights()
    model_type = values["model_type"]
    stored = _with_current_names(model_type, stored_safetensors(folder))
    check_fits(config, [tensor.shape for tensor in stored.values()], name)
    config, stored = _without_zero_biases(values, config, stored)
    ignored = r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$"
    head = f"{ARCHITECTURES[model_type].tensors['lm_head']}.weight"
    plan = tensor_plan(model_type, config)
    weights = to_our_names(config, plan, stored, name, ignored, head)
    return SourceCheckpoint(name, model_type, config, tokenizer, weights, plan)


def _with_current_names(model_type: str, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The names of a whole model in the table; those on the hub's GPT-2 are of one that was saved without its head."""
    architecture = ARCHITECTURES[model_type]
    for other, name in architecture.other_names.items():
        if other in stored and name not in stored:
            stored = {name if found == other else found: tensor for found, tensor in stored.items()}
    prefix, embedding = architecture.base_prefix, f"{architecture.tensors['wte']}.weight"
    if not prefix or embedding.removeprefix(prefix) not in stored:
        return stored
    return {name if name.startswith("lm_head") else prefix + name: tensor for name, tensor in stored.items()}


def _without_zero_biases(
    values: dict[str, Any], config: GPTConfig, stored: dict[str, StoredTensor]
) -> tuple[GPTConfig, dict[str, StoredTensor]]:
    """What we wrote comes back as it was, unless the folder was trained on in between and the biases are in use."""
    hints = values.get(HINTS)
    if not isinstance(hints, dict):
        return config, stored
    bare = GPTConfig.from_dict({**config.to_dict(), **hints})
    check_fits(bare, [tensor.shape for tensor in stored.values()], f"config.json: {HINTS}")
    wanted = {name for entry in tensor_plan(values["model_type"], bare) for name in entry.theirs}
    extra = [n for entry in tensor_plan(values["model_type"], config) for n in entry.theirs if n not in wanted]
    if any(name in stored and stored[name].read().count_nonzero() for name in extra):
        return config, stored
    return bare, {name: tensor for name, tensor in stored.items() if name not in extra}


def stored_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder, from one file or from the shards that the index names.

    Raises:
        UserError: if there are none, a shard is missing or damaged, or the index names a file outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            pickled = sorted(folder.glob("*.bin"))
            why = f" ({pickled[0].name} is a pickle: save it with safe_serialization=True)" if pickled else ""
            raise UserError(f"{folder} has no model.safetensors{why}: only safetensors are read")
        return open_safetensors(single)
    where = weight_map(index)
    opened = {shard: open_safetensors(folder / shard) for shard in sorted(set(where.values()))}
    faults = [f"{shard} lacks {name}" for name, shard in where.items() if name not in opened[shard]]
    if faults:
        raise UserError(f"{index} does not fit its shards: {'; '.join(faults)}")
    return {name: tensor for shard in opened.values() for name, tensor in shard.items()}


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → file name, as the index says.

    Raises:
        UserError: if the index is damaged or names a file outside its folder.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} has no weight_map: get it again")
    for shard in where.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} is refused: it names {brief(shard)}, which is no file of its folder")
    return where


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; its header, which safetensors checks, is parsed here for where their data lies."""
    import torch

    try:
        reader = ExtentReader(path)
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, though the index names it: get it again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    stored = {}
    for name in names:
        entry = header[name]
        dtype = getattr(torch, _DTYPES.get(entry["dtype"], "int8"))
        extent = Extent.of(
            torch.empty(entry["shape"], dtype=dtype, device="meta"), 8 + length + entry["data_offsets"][0]
        )
        stored[name] = StoredTensor(tuple(extent.size), dtype, partial(reader.read, extent), extent)
    return stored
