"""Files of `torch.save`: unpickled once, their tensors read from where they lie."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gpt

import lit_gpt
from lit_gpt.checkpoint.format import load_model, save_model
from lit_gpt.checkpoint.torch_file import OpenTorchFile
from lit_gpt.convert.recognise import open_source
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import get_tokenizer


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each call of `torch.load`."""
    calls: list[object] = []
    load = torch.load

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(options.get("map_location"))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", counting)
    return calls


def nanogpt_checkpoint(path: Path, layers: int) -> None:
    """What nanoGPT's train.py saves, of a model with that many layers."""
    state = {
        f"transformer.{name}": tensor
        for name, tensor in tiny_gpt(n_layer=layers, n_embd=8, n_head=2, vocab_size=11, mlp="gelu").state_dict().items()
    }
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight")
    arguments = {"n_layer": layers, "n_head": 2, "n_embd": 8, "block_size": 32, "bias": True, "vocab_size": 11}
    torch.save({"model": state, "model_args": arguments}, path)


def test_our_checkpoint_is_unpickled_once(tmp_path: Path, unpickled: list[object]) -> None:
    model = tiny_gpt(dtype=torch.float32)
    save_model(tmp_path / "x.ckpt", model, get_tokenizer("byte"))
    for load in (
        lambda: lit_gpt.load(str(tmp_path / "x.ckpt"), precision="fp32", device="cpu").model,
        lambda: load_model(tmp_path / "x.ckpt")[0],
    ):
        unpickled.clear()
        loaded = load()
        assert unpickled == ["meta"]
        assert torch.equal(loaded.wte.weight, model.wte.weight)


@pytest.mark.slow
def test_a_checkpoint_of_600_tensors_is_unpickled_once(tmp_path: Path, unpickled: list[object]) -> None:
    nanogpt_checkpoint(tmp_path / "ckpt.pt", layers=50)
    source = open_source(str(tmp_path / "ckpt.pt"))
    assert len(source.weights) >= 600
    model = source.load()
    assert unpickled == ["meta"]
    assert torch.equal(model.h[49].ln_2.bias, source.weights["h.49.ln_2.bias"].read())


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 4)
    return {
        "plain": base,
        "rows": base[2:4],
        "transposed": base.t(),
        "expanded": torch.randn(1, 3).expand(2, 3),
        "bf16": torch.randn(5, 3).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "number": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "int8": torch.arange(5, dtype=torch.int8),
    }


FORMS = ["torch's", "torch's with a view of few of many", "before zip", "another program's"]


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_any_layout_are_read_as_they_were_saved(form: str, tmp_path: Path) -> None:
    path, saved = tmp_path / "x.pt", odd_tensors()
    if form == FORMS[1]:
        saved["stretched"] = torch.randn(64)[::9]
    torch.save({"inside": saved}, path, _use_new_zipfile_serialization=form != "before zip")
    if form == "another program's":  # other offsets than those that torch computes
        torch.save({"inside": saved}, tmp_path / "torch.pt")
        with zipfile.ZipFile(tmp_path / "torch.pt") as old, zipfile.ZipFile(path, "w") as new:
            for record in sorted(old.infolist(), key=lambda record: record.filename, reverse=True):
                new.writestr(record.filename, old.read(record))
    file = OpenTorchFile(path)
    tensors = file.tensors("inside")
    assert tensors.keys() == saved.keys()
    assert tensors["plain"].is_meta == (form == "torch's"), "of the others torch maps or reads all"
    for name, tensor in tensors.items():
        read = file.read(tensor)
        assert (read.dtype, read.shape) == (saved[name].dtype, saved[name].shape), name
        assert torch.equal(read, saved[name]), name
        read.fill_(0)
        assert torch.equal(file.read(tensor), saved[name]), f"{name} is in memory of its own"


def _rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [_rewrite, lambda path: path.write_bytes(path.read_bytes()[:-2000])])
def test_a_file_that_changes_while_it_is_read_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    save_model(tmp_path / "x.ckpt", tiny_gpt(dtype=torch.float32), None)
    source = open_source(str(tmp_path / "x.ckpt"))
    change(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="changed while it was read"):
        source.load()
