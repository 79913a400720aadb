"""`fit` with `--trainer.max_time`, through the program."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import yaml
from environment import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt.__main__ import main

SETTINGS = """
model: {preset: nano, config: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}}
data: {batch_size: 8, source: text.py, path: tokens, tokenizer: byte, val_split: "tail:0.1"}
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 6
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  limit_val_batches: 2
  log_every_n_steps: 1
  enable_progress_bar: false
samples: {prompts: []}
"""
FIT = ["fit", "--config", "settings.yaml"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    Path("settings.yaml").write_text(SETTINGS)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ("three minutes", "trainer.max_time=three minutes is no duration: write DD:HH:MM:SS"),
        ("180", "trainer.max_time"),
        ("00:00:00:00", "trainer.max_time=00:00:00:00 must be above zero"),
        ("-00:00:01:00", "trainer.max_time=-00:00:01:00 is no duration"),
        ('{"minutes": -3}', "must be above zero"),
    ],
)
def test_what_is_no_duration_is_refused_before_any_work(
    duration: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, f"--trainer.max_time={duration}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert sorted(path.name for path in folder.iterdir()) == ["settings.yaml", "text.py"]


@pytest.mark.slow
def test_a_warm_up_in_steps_needs_a_number_of_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--trainer.max_time", "00:01:00:00", "--trainer.max_steps", "-1", "--model.schedule.warmup", "2"]
    assert main([*FIT, *asked]) == 2
    assert "warmup=2 steps: a run that trainer.max_time ends" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_log_and_tensorboard_show_the_budget_and_a_resumed_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*FIT, "--trainer.max_time", "00:01:00:00"]
    assert main(asked) == 0
    said = capsys.readouterr().err
    assert "budget: 1:00:00 for training, validation and samples" in said
    assert "of 3600 s spent by step 6" in said
    assert "Ignoring" not in said
    run = folder / "lightning_logs/version_0"
    events = EventAccumulator(str(run)).Reload()
    assert [entry.value for entry in events.Scalars("budget/share")] == pytest.approx(
        [step / 6 for step in range(1, 7)]
    )
    assert main([*asked, "--ckpt_path", "last", "--trainer.max_steps", "8"]) == 0
    said = capsys.readouterr().err
    assert "s of it spent before" in said
    assert "of 3600 s spent by step 8" in said


@pytest.mark.slow
def test_a_second_is_too_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--trainer.max_time", "00:00:00:01", "--model.config.n_embd", "512", "--model.config.block_size", "512"]
    assert main([*FIT, *asked]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("lit_gpt: error: trainer.max_time=0:00:01 is too short: ")
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_no_configuration_says_what_the_machine_should(path: Path) -> None:
    settings = yaml.safe_load(path.read_text("utf-8"))
    assert settings["trainer"].get("precision", "auto") == "auto"
    assert settings["model"].get("compile", "auto") == "auto"


def test_the_quickstart_has_a_budget_that_is_a_duration() -> None:
    settings = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))
    assert settings["trainer"]["max_time"] == "00:00:02:45"
    assert settings["model"]["schedule"]["warmup"] < 1
