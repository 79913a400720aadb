"""Nothing that is converted can run code or reach outside its folder; what is written appears whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import ROOT
from fork_server import ForkServer
from safetensors.torch import load_file, save_file

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import save_model
from lit_gpt.convert.recognise import load_source, open_source
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

RunProgram = Callable[..., Any]


class Evil:
    """What pickle makes of this runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: GPT) -> Path:
    save_model(tmp_path / "tiny.ckpt", tiny_model, None)
    return tmp_path / "tiny.ckpt"


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_by_its_name(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "ckpt.pt"
    content = {"model": {"x": torch.zeros(1)}, "model_args": Evil(mark)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=rf"{os.name}\.system"):
        open_source(str(path))
    assert not mark.exists()


def test_a_vocabulary_that_runs_code_is_refused_by_its_name(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Evil(mark)}))
    from lit_gpt.convert.nanogpt import character_tokenizer

    with pytest.raises(UserError, match=rf"{os.name}\.system"):
        character_tokenizer(tmp_path / "meta.pkl")
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"stoi": {"ab": 0}})])
def test_a_vocabulary_that_is_something_else(content: bytes, tmp_path: Path) -> None:
    from lit_gpt.convert.nanogpt import character_tokenizer

    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl"):
        character_tokenizer(tmp_path / "meta.pkl")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "config.json", 3])
def test_an_index_that_points_outside_is_refused(shard: Any, checkpoint: Path, tmp_path: Path) -> None:
    write_hf(open_source(str(checkpoint)), tmp_path / "in" / "hf")
    (tmp_path / "in" / "hf" / "model.safetensors").rename(tmp_path / "in" / "model.safetensors")
    names = load_file(tmp_path / "in" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, shard)}
    (tmp_path / "in" / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is refused"):
        open_source(str(tmp_path / "in" / "hf"))


def test_shards_that_are_missing_or_lack_a_tensor(checkpoint: Path, tmp_path: Path) -> None:
    write_hf(open_source(str(checkpoint)), tmp_path / "hf")
    names = list(load_file(tmp_path / "hf" / "model.safetensors"))
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}))
    with pytest.raises(UserError, match=r"gone\.safetensors does not exist"):
        open_source(str(tmp_path / "hf"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(["one", "two"], "model.safetensors")}))
    with pytest.raises(UserError, match=r"model\.safetensors lacks one; model\.safetensors lacks two"):
        open_source(str(tmp_path / "hf"))


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_truncated_files(keep: float, checkpoint: Path, tmp_path: Path) -> None:
    write_hf(open_source(str(checkpoint)), tmp_path / "hf")
    for path, source in ((tmp_path / "hf" / "model.safetensors", tmp_path / "hf"), (checkpoint, checkpoint)):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep if keep > 1 or keep == 0 else keep * len(content))])
        with pytest.raises(UserError, match="damaged"):
            open_source(str(source))


def test_folders_without_a_model(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"did you mean .*tiny\.ckpt"):
        open_source(str(tmp_path))
    write_hf(open_source(str(checkpoint)), tmp_path / "hf")
    with pytest.raises(UserError, match="give the folder"):
        open_source(str(tmp_path / "hf" / "model.safetensors"))
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        open_source(str(tmp_path / "hf"))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds a list"):
        open_source(str(tmp_path / "a.pt"))
    torch.save({"weights": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="it holds weights"):
        open_source(str(tmp_path / "b.pt"))
    with pytest.raises(UserError, match=r"c\.pt does not exist"):
        open_source(str(tmp_path / "c.pt"))


def test_nothing_is_overwritten_and_nothing_is_left_behind(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(str(checkpoint))
    content = checkpoint.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_lit_gpt(source, checkpoint)
    with pytest.raises(UserError, match="exists already"):
        write_hf(source, tmp_path)
    assert checkpoint.read_bytes() == content
    checkpoint.unlink()  # the weights are read while the output is written: now they are gone
    for write, output in ((write_lit_gpt, tmp_path / "a.ckpt"), (write_hf, tmp_path / "hf")):
        with pytest.raises(FileNotFoundError):
            write(source, output)
    assert list(tmp_path.iterdir()) == []


def test_a_streamed_checkpoint_is_what_torch_would_have_saved(checkpoint: Path, tmp_path: Path) -> None:
    write_lit_gpt(open_source(str(checkpoint)), tmp_path / "again.ckpt")
    old = torch.load(checkpoint, weights_only=True)
    new = torch.load(tmp_path / "again.ckpt", weights_only=True)
    states = old.pop("state_dict"), new.pop("state_dict")
    assert old == new
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    wte, head = states[1]["model.wte.weight"], states[1]["model.lm_head.weight"]
    assert wte.data_ptr() == head.data_ptr()  # tied, and stored once


@pytest.mark.slow
def test_the_program(
    checkpoint: Path,
    tmp_path: Path,
    program: RunProgram,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = program("convert", checkpoint, "hf", "--to", "hf", "--dtype", "bfloat16")
    assert (done.returncode, done.stdout) == (0, "hf\n"), done.stderr
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    done = program("convert", "hf", "again.ckpt", "--dtype", "float32")
    assert (done.returncode, done.stdout) == (0, "again.ckpt\n"), done.stderr
    rounded, original = load_source(str(tmp_path / "again.ckpt"))[0], load_source(str(checkpoint))[0]
    assert torch.equal(rounded.wte.weight, original.wte.weight.bfloat16().float())
    done = program("convert", "some/model", "b.ckpt", HF_HOME=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "neither a file here nor in the hub's cache" in done.stderr
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (("hf", "again.ckpt"), "again.ckpt exists already"),
        (("nowhere.pt", "b.ckpt"), "nowhere.pt does not exist"),
        (("hf", "b.ckpt", "--dtype", "int3"), "int3"),
    ):
        assert main(["convert", *arguments]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_surplus_head_in_a_tied_safetensors_file(checkpoint: Path, tmp_path: Path) -> None:
    write_hf(open_source(str(checkpoint)), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, file, {"format": "pt"})
    assert open_source(str(tmp_path / "hf")).config.tie_embeddings


MEASURE = """
import sys
from pathlib import Path
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.write import write_hf, write_lit_gpt
open_source(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again, from what the imports take

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

before = status("VmRSS")
{"hf": write_hf, "lit_gpt": write_lit_gpt}[sys.argv[3]](open_source(sys.argv[1]), Path(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux counts it")
def test_converting_takes_little_more_memory_than_the_largest_tensor(tmp_path: Path, fork_server: ForkServer) -> None:
    """A model of 76 MiB, its largest tensor 4 MiB, goes through in both directions in less than 40 MiB."""
    config = GPTConfig(vocab_size=2048, n_embd=512, n_layer=6, n_head=8, block_size=64)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter)  # what was in that memory could be NaN, which differs from itself
    model.tie_weights()  # which an empty copy is not
    save_model(tmp_path / "big.ckpt", model, None)
    del model
    assert (tmp_path / "big.ckpt").stat().st_size > 76 * 2**20
    (tmp_path / "measure.py").write_text(MEASURE)
    for source, output, to in (("big.ckpt", "hf", "hf"), ("hf", "again.ckpt", "lit_gpt")):
        done = fork_server.run(tmp_path / "measure.py", tmp_path / source, tmp_path / output, to, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 40 * 1024, f"{to}: {int(done.stdout) / 1024:.0f} MiB"
