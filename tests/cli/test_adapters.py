"""LoRA as a user runs it: fit, go on, validate, predict, merge, export; and every refusal in one line."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_adapter, save_base

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.checkpoint.format import load_checkpoint, read_header
from lit_gpt.convert.recognise import load_source
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import get_tokenizer

SETTINGS = """
model: {schedule: {warmup: 0, name: constant}, optimizer: {lr: 0.01}}
data: {batch_size: 4, source: text.py, path: tokens, val_split: "tail:0.1"}
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  limit_val_batches: 2
  enable_progress_bar: false
samples: {prompts: []}
"""
FIT = ["fit", "--config", "settings.yaml", "--init_from", "base.ckpt"]
LORA = ["--model.lora.rank", "2", "--model.lora.alpha", "8", "--model.lora.targets", "c_attn.q,c_proj,c_fc"]
WRITE = ["--start", "def ", "--max_new_tokens", "8", "--temperature", "0", "--ignore_eos"]
VERSION = Path("lightning_logs/version_0/checkpoints")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The program, in this process and in an empty folder with a base and a text; its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    save_base(Path("base.ckpt"))
    Path("text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    Path("settings.yaml").write_text(SETTINGS)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def refused(result: tuple[int, str, str], message: str) -> None:
    status, _, errors = result
    assert status == 2, errors
    assert message in errors.strip().splitlines()[-1], errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_from_fit_to_a_merged_model(inside: Any, tmp_path: Path) -> None:
    status, _, errors = inside(*FIT, *LORA)
    assert status == 0, errors
    last = VERSION / "last.ckpt"
    header = read_header(last)
    assert header.adapter is not None and header.adapter.base == str(tmp_path / "base.ckpt")
    assert header.adapter.lora.targets == "c_attn.q,c_proj,c_fc" and header.hyper_parameters["lora"]["rank"] == 2
    assert last.stat().st_size < Path("base.ckpt").stat().st_size  # with its optimizer's state
    best = sorted(VERSION.glob("best*.ckpt"))[0]
    assert set(load_checkpoint(best)["state_dict"]) == set(load_checkpoint(last)["state_dict"])

    status, figures, errors = inside("validate", "--ckpt_path", last, "--trainer.accelerator", "cpu")
    assert status == 0 and "val/loss" in figures, errors
    status, text, errors = inside("predict", "--ckpt_path", last, *WRITE)
    assert status == 0, errors
    status, named, errors = inside("predict", "--ckpt_path", "base.ckpt", "--adapter", f"a={last}", *WRITE)
    assert status == 0 and named == text, errors
    assert inside("predict", "--ckpt_path", "base.ckpt", *WRITE)[1] != text

    assert inside("convert", "base.ckpt", last, "merged.ckpt")[0] == 0
    assert inside("convert", last, "merged2.ckpt")[0] == 0
    models = [load_source(path)[0].state_dict() for path in ("merged.ckpt", "merged2.ckpt", str(last))]
    assert all(torch.equal(models[0][name], other[name]) for other in models[1:] for name in models[0])
    status, merged, _ = inside("predict", "--ckpt_path", "merged.ckpt", *WRITE)
    assert status == 0 and merged == text
    assert inside("convert", last, "peft", "--to", "peft")[0] == 0
    assert {path.name for path in Path("peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert inside("convert", "base.ckpt", "peft", "from_peft.ckpt")[0] == 0
    torch.testing.assert_close(load_source("from_peft.ckpt")[0].state_dict(), models[0], rtol=0, atol=1e-6)
    assert inside("predict", "--init_from", "base.ckpt", "--adapter", "a=peft", *WRITE)[1] == text
    assert inside("info", "--ckpt_path", last)[0] == 0


@pytest.mark.slow
def test_going_on_gives_the_same_bits_also_when_the_base_has_moved(inside: Any) -> None:
    assert inside(*FIT, *LORA, "--trainer.max_steps", 6, "--trainer.default_root_dir", "whole")[0] == 0
    assert inside(*FIT, *LORA, "--trainer.max_steps", 3)[0] == 0
    going_on = ["fit", "--config", "settings.yaml", "--ckpt_path", "last", "--trainer.max_steps"]
    Path("base.ckpt").rename("moved.ckpt")
    refused(inside(*going_on, 5), "base.ckpt does not exist")
    status, _, errors = inside(*going_on, 5, "--init_from", "moved.ckpt")
    assert status == 0, errors
    assert inside(*going_on, 6)[0] == 0  # now it is known where the base is
    states = [load_checkpoint(root / VERSION / "last.ckpt")["state_dict"] for root in (Path(), Path("whole"))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    for words, message in [
        (["--model.lora.rank", 3], "model.lora.rank=3 differs from the run's 2"),
        (["--model.lora.targets", "c_fc"], "model.lora.targets=c_fc differs from the run's c_attn.q,c_proj,c_fc"),
        (["--model.base_precision", "int8"], "model.base_precision=int8 differs from the run's auto"),
    ]:
        refused(inside(*going_on, 7, *words), message)
    save_base(Path("other.ckpt"), seed=1)
    refused(inside(*going_on, 7, "--init_from", "other.ckpt"), "was trained on another base than other.ckpt")
    refused(inside("predict", "--ckpt_path", "last", "--init_from", "other.ckpt", *WRITE), "another base")


@pytest.mark.slow
def test_a_vocabulary_that_grows_over_a_frozen_base(inside: Any) -> None:
    with_chat_template(get_tokenizer("byte")).save("chat.json")
    words = ["--data.tokenizer", "chat.json", "--data.path", "chat_tokens"]
    status, _, errors = inside(*FIT, *LORA, *words)
    assert status == 0, errors
    last = VERSION / "last.ckpt"
    assert load_checkpoint(last)["state_dict"]["model.wte.rows"].shape == (2, 32)
    model, tokenizer = load_source(str(last))
    base, _ = load_source("base.ckpt")
    assert tokenizer is not None and tokenizer.chat_template is not None and model.config.vocab_size == 259
    assert torch.equal(model.wte.weight[:257], base.wte.weight)  # type: ignore[arg-type,index]
    assert inside(*FIT[:3], "--ckpt_path", "last", "--trainer.max_steps", 5)[0] == 0
    status, text, errors = inside("predict", "--ckpt_path", last, *WRITE)
    assert status == 0, errors
    named = inside("predict", "--ckpt_path", "base.ckpt", "--adapter", f"a={last}", *WRITE)
    assert named[:2] == (0, text), named
    gpt = load("base.ckpt", "fp32", adapters={"a": str(last)})
    settings = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    assert "def " + gpt.generate("def ", adapter="a", **settings) in text


@pytest.mark.slow
def test_prompts_that_name_their_adapter(inside: Any) -> None:
    for seed, name in enumerate(("one", "two"), 1):
        save_adapter(Path(f"{name}.ckpt"), Path("base.ckpt"), seed)
    lines = [{"prompt": "x", "model": "two"}, {"prompt": "x"}, {"prompt": "x", "model": "one"}]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapters = ["--adapter", "one=one.ckpt", "--adapter", "two=two.ckpt"]
    common = ["predict", "--ckpt_path", "base.ckpt", *WRITE[2:], "--prompts", "p.jsonl"]
    status, _, errors = inside(*common, *adapters, "--output", "out.jsonl")
    assert status == 0, errors
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    settings = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    alone = {name: load(f"{name}.ckpt", "fp32").generate("x", **settings) for name in ("one", "two")}
    assert [record["text"] for record in records] == [alone["two"], alone["one"], alone["one"]]
    Path("p.jsonl").write_text(json.dumps({"prompt": "x", "model": "too"}) + "\n")
    refused(inside(*common, *adapters), 'prompt 1: there is no adapter "too": did you mean "two"?')


BAD = [
    ([*FIT, "--model.lora.rank", "33"], "lora.rank=33 is above the width of h.0.attn.c_attn, 32"),
    ([*FIT, "--model.lora.rank", "2", "--model.lora.targets", "c_gate"], '"c_gate" matches no linear layer'),
    ([*FIT, "--model.lora.targets", "c_fc"], "lora.targets has no effect without lora.rank"),
    ([*FIT, "--model.base_precision", "int8"], "base_precision=int8 has no effect without lora.rank"),
    ([*FIT[:3], "--model.lora.rank", "2"], "model.lora.rank=2 needs a base to adapt: name it with --init_from"),
    (["fit", "--init_from", "a.ckpt", "--model.lora.rank", "2"], "is an adapter, and model.lora.rank=2"),
    (["predict", "--ckpt_path", "base.ckpt", "--adapter", "a", *WRITE], "--adapter a is not NAME=PATH"),
    (["predict", "--ckpt_path", "a.ckpt", "--adapter", "b=a.ckpt", *WRITE], "is an adapter itself"),
    (["predict", "--ckpt_path", "other.ckpt", "--adapter", "a=a.ckpt", *WRITE], "another base than other.ckpt"),
    (["convert", "other.ckpt", "a.ckpt", "x.ckpt"], "adapter a.ckpt was trained on another base than other.ckpt"),
    (["convert", "base.ckpt", "other.ckpt", "x.ckpt"], "other.ckpt is a whole model, no adapter"),
    (["convert", "base.ckpt", "x", "--to", "peft"], "base.ckpt is a whole model, no adapter"),
    (["convert", "a.ckpt", "x", "--to", "peft", "--dtype", "bf16"], "--dtype is for whole models"),
    (["convert", "a.ckpt", "base.ckpt", "--to", "peft"], "base.ckpt exists already"),
    (["predict", "--ckpt_path", "lost.ckpt", *WRITE], "gone.ckpt does not exist"),
    (["predict", "--ckpt_path", "nested.ckpt", *WRITE], "is an adapter itself: make one model of it and its base"),
    (["predict", "--ckpt_path", "base.ckpt", "--init_from", "base.ckpt", *WRITE], "give one of them"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(inside: Any, words: list[str], message: str) -> None:
    save_adapter(Path("a.ckpt"), Path("base.ckpt"), 1)
    save_base(Path("other.ckpt"), seed=1)
    if "lost.ckpt" in words:
        save_base(Path("gone.ckpt"), seed=2)
        save_adapter(Path("lost.ckpt"), Path("gone.ckpt"), 1)
        Path("gone.ckpt").unlink()
    if "nested.ckpt" in words:
        shutil.copy("base.ckpt", "under.ckpt")
        save_adapter(Path("nested.ckpt"), Path("under.ckpt"), 1)
        shutil.copy("a.ckpt", "under.ckpt")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    refused(inside(*words), message)
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert before == after  # nothing was prepared, and nothing written
