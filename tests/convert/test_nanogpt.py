"""A folder of nanoGPT, taken as its `--out_dir` is; and heads that a file does not say, asked for by the right name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gpt

import lit_gpt
from lit_gpt.__main__ import main
from lit_gpt.cli.defaults import find_weights
from lit_gpt.convert.recognise import files_of_source, open_source
from lit_gpt.errors import UserError

CHARACTERS = "\n abcdefgh."
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 32, "bias": True}


def nanogpt_folder(folder: Path, dataset: Any = "shakespeare_char", rows: int = len(CHARACTERS)) -> Path:
    """What nanoGPT's train.py leaves in its `--out_dir`."""
    folder.mkdir(parents=True)
    model = tiny_gpt(n_layer=1, n_head=2, n_embd=8, vocab_size=rows, mlp="gelu", dtype=torch.float32)
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight")
    config = {"dataset": dataset, "out_dir": folder.name}
    torch.save({"model": state, "model_args": {**SHAPE, "vocab_size": rows}, "config": config}, folder / "ckpt.pt")
    return folder


def write_meta(folder: Path, characters: str = CHARACTERS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = {character: number for number, character in enumerate(characters)}
    meta = {"vocab_size": len(table), "stoi": table, "itos": dict(enumerate(characters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("where", ["out", "data/shakespeare_char", "."])
def test_a_folder_with_its_characters(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nanogpt_folder(tmp_path / "out")
    write_meta(tmp_path / where)
    source = open_source(f"{folder}/")
    assert source.kind == "nanoGPT" and source.tokenizer is not None
    assert source.tokenizer.encode("abba.") == [CHARACTERS.index(c) for c in "abba."]
    monkeypatch.chdir(tmp_path)
    assert open_source("out").tokenizer is not None  # nothing depends on where the program runs
    monkeypatch.chdir(folder)
    assert open_source("ckpt.pt").tokenizer is not None
    assert ("meta.pkl" in capsys.readouterr().err) == (where != "out")  # said, if the user has not put it there
    assert folder / "ckpt.pt" in files_of_source(str(folder))


def test_characters_of_other_data_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of the data has been prepared anew from another text, with more or fewer characters."""
    folder = nanogpt_folder(tmp_path / "out")
    write_meta(tmp_path / "data/shakespeare_char", CHARACTERS + "xyz")
    assert open_source(str(folder)).tokenizer is None
    assert (
        f"has {len(CHARACTERS) + 3} characters, the model {len(CHARACTERS)}: it is not used" in capsys.readouterr().err
    )
    write_meta(folder, CHARACTERS + "xyz")
    with pytest.raises(UserError, match="copy the one of its data there"):
        open_source(str(folder))
    write_meta(folder)
    assert open_source(str(folder)).tokenizer is not None  # the user's own comes first


@pytest.mark.parametrize(
    "dataset", ["../../secret", "/secret", "a/../../../secret", "x" * 300, "a\0b", 3, None, "字" * 90]
)
def test_a_name_of_data_that_leads_elsewhere_is_not_followed(dataset: Any, tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path / "project/out", dataset)
    (tmp_path / "project/data/a").mkdir(parents=True)
    for outside in (tmp_path / "secret", tmp_path / "project/secret"):
        write_meta(outside)
    assert open_source(str(folder)).tokenizer is None


def test_a_hugging_face_folder_with_such_a_file_stays_one(tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path / "out")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type"):
        open_source(str(folder))


def test_the_api_and_convert_take_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nanogpt_folder(tmp_path / "out")
    write_meta(tmp_path / "data/shakespeare_char")
    gpt = lit_gpt.load(str(folder), precision="fp32", device="cpu")
    text = gpt.generate("abc", max_new_tokens=5, temperature=0)
    assert len(text) == 5 and set(text) <= set(CHARACTERS)
    assert main(["convert", str(folder), str(tmp_path / "a.ckpt")]) == 0, capsys.readouterr().err
    again = lit_gpt.load(str(tmp_path / "a.ckpt"), precision="fp32", device="cpu")
    assert again.generate("abc", max_new_tokens=5, temperature=0) == text


@pytest.mark.slow
def test_predict_and_serve_take_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_gpt.serve import main as serve_main

    monkeypatch.chdir(tmp_path)
    folder = nanogpt_folder(tmp_path / "out-shakespeare-char")
    write_meta(tmp_path / "data/shakespeare_char")
    words = ["--max_new_tokens", "5", "--temperature", "0", "--trainer.accelerator", "cpu", "--precision", "fp32"]
    assert main(["predict", "--init_from", "out-shakespeare-char/", "--start", "abc", *words]) == 0
    text = lit_gpt.load(str(folder), "fp32", "cpu").generate("abc", max_new_tokens=5, temperature=0)
    assert f"abc{text}" in capsys.readouterr().out
    options = serve_main.parse(["--init_from", "out-shakespeare-char/", "--precision", "fp32", "--device", "cpu"])
    service = serve_main.build_service(options, options.init_from)
    assert service.name == "out-shakespeare-char"


# Heads ---------------------------------------------------------------------------------------------------------------


def book_file(path: Path) -> str:
    """A state dict of "LLMs from scratch" whose width is none of GPT-2's."""
    torch.manual_seed(0)
    norm = {"scale": (8,), "shift": (8,)}
    attention = {f"W_{part}.weight": (8, 8) for part in ("query", "key", "value")}
    attention |= {"out_proj.weight": (8, 8), "out_proj.bias": (8,)}
    hidden = {"0.weight": (32, 8), "0.bias": (32,), "2.weight": (8, 32), "2.bias": (8,)}
    parts = {"norm1": norm, "norm2": norm, "att": attention, "ff.layers": hidden}
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (11, 8),
        "pos_emb.weight": (16, 8),
        "out_head.weight": (11, 8),
    }
    shapes |= {f"final_norm.{name}": shape for name, shape in norm.items()}
    shapes |= {f"trf_blocks.0.{part}.{name}": shape for part, inner in parts.items() for name, shape in inner.items()}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, path)
    return str(path)


def test_python_is_told_the_keyword(tmp_path: Path) -> None:
    path = book_file(tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"how many heads its width of 8 has: give load\(\.\.\., n_head=N\)$"):
        lit_gpt.load(path)
    with pytest.raises(UserError, match=r"give n_head=N$"):
        open_source(path)
    gpt = lit_gpt.load(path, "fp32", "cpu", n_head=4)
    assert gpt.config.n_head == 4
    for wrong, message in ((3, "n_embd"), (0, "n_head"), (-4, "n_head")):
        with pytest.raises(UserError, match=message):
            lit_gpt.load(path, "fp32", "cpu", n_head=wrong)
    with pytest.raises(UserError, match=r"give the \.ckpt that lit_gpt convert --n_head N makes of it$"):
        gpt.engine(draft=path)


COMMANDS = {
    "convert": ["SOURCE", "OUTPUT"],
    "info": ["--init_from", "SOURCE"],
    "predict": ["--init_from", "SOURCE", "--prompts", "PROMPTS"],
    "validate": ["--init_from", "SOURCE", "--data.path", "data"],
    "fit": ["--init_from", "SOURCE", "--data.path", "data"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_names_its_own_flag(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": [1, 2]}) + "\n")
    names = {"SOURCE": book_file(tmp_path / "model.pth"), "OUTPUT": "a.ckpt", "PROMPTS": "prompts.jsonl"}
    assert main([command, *(names.get(word, word) for word in COMMANDS[command])]) == 2
    printed = capsys.readouterr()
    last = printed.err.rstrip("\n").rpartition("\n")[2]
    assert printed.out == "" and last.endswith(f"give lit_gpt {command} --n_head N"), printed.err
    if command != "convert":
        flags = [name for name in COMMANDS[command][2:] if name != "PROMPTS" and name != "--prompts"]
        assert main([command, "--n_head", "4", "--ckpt_path", "x.ckpt", *flags]) == 2
        assert "--n_head 4 is for --init_from" in capsys.readouterr().err


def test_serve_names_its_own_flag(tmp_path: Path) -> None:
    from lit_gpt.serve import main as serve_main

    path = book_file(tmp_path / "model.pth")
    options = serve_main.parse(["--init_from", path])
    with pytest.raises(UserError, match=r"give lit_gpt serve --n_head N$"):
        serve_main.build_service(options, options.init_from)
    with pytest.raises(UserError, match="--n_head 4 is for --init_from"):
        serve_main.parse(["--ckpt_path", "x.ckpt", "--n_head", "4"])


def test_the_flag_is_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jsonargparse import Namespace

    path = book_file(tmp_path / "model.pth")
    assert main(["info", "--init_from", path, "--n_head", "4", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["n_head"] == 4
    assert main(["convert", path, str(tmp_path / "a.ckpt"), "--n_head", "4"]) == 0
    assert open_source(str(tmp_path / "a.ckpt"), n_head=4).config.n_head == 4
    weights = find_weights("predict", Namespace(ckpt_path=None, init_from=path, n_head=2))
    assert weights.config is not None and weights.config.n_head == 2
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"), "--n_head", "2"]) == 2
    assert "n_head=2, but" in capsys.readouterr().err and not (tmp_path / "b.ckpt").exists()
