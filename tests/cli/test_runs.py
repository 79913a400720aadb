"""Run folders: one for each run, one writer at a time, and nothing in them replaced by a run that was refused."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import signal
import string
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from jsonargparse import Namespace

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import Header, load_checkpoint, read_header, save_checkpoint
from lit_gpt.cli.defaults import ExistingWeights, refuse_changed_model, refuse_changed_run
from lit_gpt.errors import UserError
from lit_gpt.files.locks import Lock
from lit_gpt.model.config import GPTConfig

SETTINGS = """
model: {preset: nano, config: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}, schedule: {warmup: 0}}
data: {batch_size: 8, source: text.py, path: tokens, tokenizer: byte, val_split: "tail:0.1"}
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
CHECKPOINTS = Path("lightning_logs/version_0/checkpoints")
FIT = ["fit", "--config", "settings.yaml"]


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    Path("settings.yaml").write_text(SETTINGS)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one run of four steps, the working directory."""
    prepare(tmp_path / "A", monkeypatch)
    assert main(FIT) == 0
    return tmp_path / "A"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_steps", "3"], "trainer.max_steps=3: the run of .* has made 4 optimizer steps already"),
        (["--model.optimizer.name", "muon"], "model.optimizer.name=muon differs from the run's adamw"),
    ],
)
# SLOW
def test_a_refused_resume_leaves_its_run_as_it_was(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run / "lightning_logs")
    capsys.readouterr()
    assert main([*FIT, "--ckpt_path", "last", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert contents(run / "lightning_logs") == before


# SLOW
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_steps": -1, "max_epochs": 2}, "trainer.max_epochs=2: the run of x.ckpt has made 3 epochs already"),
        ({"max_steps": 11, "max_epochs": None}, "trainer.max_steps=11: the run of x.ckpt has made 12 optimizer steps"),
        ({"max_steps": 12, "max_epochs": 3}, ""),
        ({"max_steps": -1, "max_epochs": -1}, ""),
        ({"max_steps": -1, "max_epochs": None}, ""),
    ],
)
def test_a_run_is_not_made_shorter_than_it_is(limits: dict[str, int | None], message: str) -> None:
    header = Header(Path("x.ckpt"), GPTConfig(), None, None, {}, {}, step=12, epoch=3)
    options = Namespace(trainer=Namespace(**limits), model=Namespace(optimizer=Namespace(name="adamw")))
    with pytest.raises(UserError, match=f"^{re.escape(message)}") if message else nullcontext():
        refuse_changed_run("fit", options, ExistingWeights(header))


def test_a_size_that_is_filled_in_is_no_change_and_another_one_is() -> None:
    """The config.yaml of a run has none, the checkpoint has what it became."""
    filled = GPTConfig(n_embd=48, n_head=2, mlp="swiglu")
    for config, asked, message in (
        (filled, None, ""),
        (filled, 64, "model.config.intermediate_size=64 differs from the checkpoint's 128"),
        (dataclasses.replace(filled, intermediate_size=64), None, "model.config.intermediate_size=None differs"),
    ):
        shape = Namespace(**{**config.to_dict(), "intermediate_size": asked})
        options = Namespace(model=Namespace(config=shape), trainer=Namespace(precision="auto"))
        header = Header(Path("x.ckpt"), config, None, None, {}, {}, step=1, epoch=0)
        with pytest.raises(UserError, match=re.escape(message)) if message else nullcontext():
            refuse_changed_model("fit", options, ExistingWeights(header))


@pytest.mark.slow
def test_a_run_that_is_in_use_refuses_a_second_writer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run / "lightning_logs")
    more = [*FIT, "--ckpt_path", "last", "--trainer.max_steps", "6"]
    with Lock(CHECKPOINTS.parent, "") as held:
        capsys.readouterr()
        assert main(more) == 2
        assert "version_0: another run is writing to it" in capsys.readouterr().err.strip().splitlines()[-1]
        held.release(remove=True)
    assert contents(run / "lightning_logs") == before
    (CHECKPOINTS / ".last.ckpt.1234.partial").write_bytes(b"of a killed run")
    assert main(more) == 0
    assert read_header(CHECKPOINTS / "last.ckpt").step == 6
    assert sorted(path.name for path in CHECKPOINTS.iterdir()) == ["best.ckpt", "last.ckpt"], "what was left is removed"
    assert not (CHECKPOINTS.parent / ".lock").exists()


# SLOW
@pytest.mark.slow
def test_a_checkpoint_of_another_folder_goes_on_in_that_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "B", monkeypatch)
    assert main(FIT) == 0
    own = contents(tmp_path / "B/lightning_logs")
    last = run / CHECKPOINTS / "last.ckpt"
    perfect = load_checkpoint(last)
    state = next(state for name, state in perfect["callbacks"].items() if "val/loss" in name)
    state |= {"best_model_score": torch.zeros(()), "kth_value": torch.zeros(())}
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.zeros(()))
    save_checkpoint(last, perfect)
    best = contents(run / CHECKPOINTS)["best.ckpt"]
    arguments = ["--ckpt_path", str(Path("../A") / CHECKPOINTS / "last.ckpt"), "--trainer.max_steps", "6"]
    assert main([*FIT, *arguments]) == 0
    assert contents(tmp_path / "B/lightning_logs") == own
    assert read_header(last).step == 6
    assert contents(run / CHECKPOINTS)["best.ckpt"] == best, "its score is known, whatever its folder is called"
    assert [path.name for path in (run / "lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_ctrl_c_is_status_130_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork_server: ForkServer
) -> None:
    """Lightning leaves with status 1 and without a word."""
    prepare(tmp_path / "A", monkeypatch)
    process = fork_server.start("-m", "lit_gpt", *FIT, "--trainer.max_steps", 1000000)
    try:
        deadline = time.monotonic() + 120
        while not (CHECKPOINTS / "last.ckpt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.output()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        errors = process.output()[1]
    finally:
        process.kill()
    assert process.returncode == 130
    said = errors[errors.index("curves: ") :].strip().splitlines()[1:]
    step = read_header(CHECKPOINTS / "last.ckpt").step
    assert said == [f"lit_gpt: interrupted after step {step}; go on with --ckpt_path {CHECKPOINTS / 'last.ckpt'}"]
    assert not (CHECKPOINTS.parent / ".lock").exists()
