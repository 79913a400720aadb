"""Checkpoints written tensor by tensor: converting needs little more memory than the largest one takes."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from lit_gpt.checkpoint.format import model_checkpoint
from lit_gpt.console.messages import note
from lit_gpt.convert.generation_json import generation_json
from lit_gpt.convert.hf_architectures import read_config, tensor_plan, write_config
from lit_gpt.convert.source import SourceCheckpoint, without_padding
from lit_gpt.convert.tokenizer_json import write_tokenizer, write_tokenizer_config
from lit_gpt.convert.weights import StoredTensor, model_shapes, to_their_names
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write, sync_folder, temporary_path
from lit_gpt.tokenizer.tokenizer import Tokenizer

CARD = "README.md"
SHARD_BYTES = 5_000_000_000
_NOTE_BYTES = 1 << 30  # a progress line for each GiB


def check_absent(path: Path) -> None:
    """Raise UserError if there is something at `path`: nothing is overwritten."""
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another name")


def write_lit_gpt(source: SourceCheckpoint, path: Path) -> None:
    """One `.ckpt` with config and tokenizer inside.

    torch.save lays out the file for tensors without data, then each is read and written at its offset.

    Raises:
        UserError: if `path` exists.
    """
    check_absent(path)
    # Memory that nobody touches takes none. (FakeTensorMode would import PyTorch's compiler, for seconds.)
    state = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in source.weights.items()}
    if source.config.tie_embeddings:
        state["lm_head.weight"] = state["wte.weight"]
    with atomic_write(path, "w+b") as file:
        with torch.serialization.skip_data():
            torch.save(model_checkpoint(source.config, source.tokenizer, state), file)
        del state
        file.seek(0)
        laid_out = torch.load(file, map_location="meta", weights_only=True)["state_dict"]
        for name, stored in with_notes(source.weights):
            file.seek(laid_out[f"model.{name}"].untyped_storage()._checkpoint_offset)
            _write_tensor(file, stored)


def write_hf(source: SourceCheckpoint, folder: Path, card: str | None = None) -> None:
    """A folder that `from_pretrained` of transformers loads.

    Args:
        source: what is written.
        folder: where.
        card: the model card; None for no README.md.

    Raises:
        UserError: if `folder` exists, or no architecture of transformers expresses the model.
    """
    check_absent(folder)
    config = write_config(source.config, source.name)
    tokenizer = source.tokenizer
    eos, bos = (None, None) if tokenizer is None else (tokenizer.eot_id, tokenizer.bos_id)
    config |= {"eos_token_id": eos, "bos_token_id": bos, "torch_dtype": _dtype_name(source)}
    files: dict[str, dict[str, Any]] = {"config.json": config, "generation_config.json": generation_json(tokenizer)}
    texts = {} if card is None else {CARD: card}
    if tokenizer is not None:
        texts |= tokenizer_files(tokenizer, source.config.block_size, source.name)
    weights = without_padding(source)
    with whole_folder(folder) as unfinished:
        for name, values in files.items():
            texts[name] = json.dumps(values, ensure_ascii=False, indent=2)
        for name, text in texts.items():
            with atomic_write(unfinished / name, "w") as file:
                file.write(text)
        _write_shards(unfinished, _their_tensors(config["model_type"], config, weights))


def tokenizer_files(tokenizer: Tokenizer, block_size: int, where: str) -> dict[str, str]:
    """The files of a tokenizer in a Hugging Face folder: name → text. Raises UserError if transformers has no such."""
    options = write_tokenizer_config(tokenizer, block_size)
    files = {
        "tokenizer.json": json.dumps(write_tokenizer(tokenizer, where), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(options, ensure_ascii=False, indent=2),
    }
    if tokenizer.chat_template is not None:
        files["chat_template.jinja"] = tokenizer.chat_template  # which newer programs read, others the config's
    return files


def _dtype_name(source: SourceCheckpoint) -> str:
    dtypes = [stored.dtype for stored in source.weights.values()]
    return str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")


def _their_tensors(
    model_type: str, config: dict[str, Any], weights: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """All tensors of a folder of `model_type`; biases that it has and our model has not are zero."""
    theirs = read_config(config, "config.json")
    dtype = weights["wte.weight"].dtype
    zeros = {
        name: StoredTensor(shape, dtype, partial(torch.zeros, shape, dtype=dtype))
        for name, shape in model_shapes(theirs).items()
        if name not in weights
    }
    return to_their_names(tensor_plan(model_type, theirs), weights | zeros)


def _write_shards(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    shards: list[dict[str, StoredTensor]] = [{}]
    for name, stored in tensors.items():
        if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + stored.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = stored
    if len(shards) == 1:
        return write_safetensors(folder / "model.safetensors", shards[0])
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    where = {name: shard_name for shard_name, shard in zip(names, shards) for name in shard}
    total = sum(stored.nbytes for stored in tensors.values())
    with atomic_write(folder / "model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, file, indent=2)
    for shard_name, shard in zip(names, shards):
        write_safetensors(folder / shard_name, shard)


_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(path: Path, tensors: dict[str, StoredTensor], about: dict[str, str] | None = None) -> None:
    """The format's header (length, then JSON; `about` is added to its metadata), and the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(about or {})}}
    end = 0
    for name, stored in tensors.items():
        start, end = end, end + stored.nbytes
        header[name] = {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, stored in with_notes(tensors):
            _write_tensor(file, stored)


def _write_tensor(file: IO[bytes], stored: StoredTensor) -> None:
    tensor = stored.read()
    if tensor.shape != stored.shape or tensor.dtype != stored.dtype:
        raise UserError("the source changed while it was read: convert it again")
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def with_notes(tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """The items of `tensors`, with a progress line for each `_NOTE_BYTES`."""
    total, done, noted = sum(stored.nbytes for stored in tensors.values()), 0, 0
    for name, stored in tensors.items():
        yield name, stored
        done += stored.nbytes
        if done - noted >= _NOTE_BYTES:
            noted = done
            note(f"{done / 2**30:.0f} of {total / 2**30:.0f} GiB")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name if the body succeeds, and is removed if it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_path(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(folder.parent)
