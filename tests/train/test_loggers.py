"""`--trainer.logger` by a short name: what is written beside TensorBoard's files; a resumed run goes on there."""

from __future__ import annotations

import csv
import json
import os
import string
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from environment import ROOT
from fork_server import ForkServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt.__main__ import main
from lit_gpt.errors import UserError
from lit_gpt.train import loggers
from lit_gpt.train.loggers import AppendingCSVLogger, check_logger, is_own_logger

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
  log_every_n_steps: 1
  enable_progress_bar: false
samples: {prompts: ["a"], max_new_tokens: 4}
"""
HERE = Path(__file__).resolve().parent
RUN = Path("lightning_logs/version_0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    Path("text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    Path("settings.yaml").write_text(SETTINGS)
    return folder


def fit(logger: str, *words: str) -> None:
    assert main(["fit", "--config", "settings.yaml", "--trainer.logger", logger, *words]) == 0


def tensorboard_losses() -> dict[int, float]:
    return {entry.step: entry.value for entry in EventAccumulator(str(RUN)).Reload().Scalars("train/loss")}


def test_a_name_is_a_logger_of_ours_and_its_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_own_logger, (None, True, "tensorboard", "csv", "mlflow", "wandb")))
    assert not any(map(is_own_logger, (False, "mlfow", [], {"class_path": "CSVLogger"})))
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    check_logger("csv")
    check_logger(False)
    with pytest.raises(UserError, match=r'trainer.logger=mlflow needs MLflow: pip install "lit_gpt\[mlflow\]"'):
        check_logger("mlflow")


@pytest.mark.slow
def test_a_misspelt_logger_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "settings.yaml", "--trainer.logger", "mlfow"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert 'trainer.logger="mlfow" is unknown: did you mean "mlflow"?' in line
    assert sorted(path.name for path in folder.iterdir()) == ["settings.yaml", "text.py"]


def test_the_table_keeps_what_a_killed_run_has_written(tmp_path: Path) -> None:
    run = tmp_path / "logs/version_3"
    first = AppendingCSVLogger(run)
    first.log_metrics({"a": 1.0}, 1)
    first.log_metrics({"a": 2.0, "b": 3.0}, 2)
    file = run / "metrics.csv"
    file.write_text(file.read_text() + "9.0,")  # torn
    second = AppendingCSVLogger(run)
    second.log_metrics({"c": 4.0}, 3)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["step"] for row in rows] == ["1", "2", "", "3"]
    assert [row["c"] for row in rows] == ["", "", "", "4.0"]
    assert [row["b"] for row in rows[:2]] == ["", "3.0"]
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


@pytest.mark.slow
def test_csv_has_what_tensorboard_has_and_a_resumed_run_appends(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("csv")
    fit("csv", "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert "will be deleted" not in capsys.readouterr().err
    with (RUN / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx(tensorboard_losses())
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [2, 4, 6]
    assert "n_embd: 16" in (RUN / "hparams.yaml").read_text()
    assert [path.name for path in Path("lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_mlflow_has_each_run_once_in_a_local_database_with_parameters_and_curves(
    folder: Path, fork_server: ForkServer
) -> None:
    """Two runs begin at the same time, where there is no database; the first is resumed; an address does not answer."""
    if find_spec("mlflow") is None:
        pytest.skip("no MLflow")
    begun = {"argv": ["fit", "--config", "settings.yaml", "--trainer.logger", "mlflow"]}
    onward = [
        "--ckpt_path",
        f"{RUN}/checkpoints/last.ckpt",
        "--trainer.max_steps",
        "6",
        "--model.optimizer.lr",
        "0.001",
    ]
    resumed = {"argv": begun["argv"] + onward}
    lost = {**begun, "environment": {"MLFLOW_TRACKING_URI": "nonsense://x"}}
    assert main(["prepare", "text.py", "--output", "tokens", "--tokenizer", "byte", "--val_split", "tail:0.1"]) == 0
    words = ("lightning_logs/mlflow.db", json.dumps([[begun, begun], [resumed, lost]]))
    done = fork_server.run(HERE / "mlflow_driver.py", *words, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    *fits, (status, said) = found["ended"]
    assert [fit[0] for fit in fits] == [0, 0, 0], fits
    assert all("mlflow ui --backend-store-uri sqlite:///lightning_logs/mlflow.db" in fit[1] for fit in fits)
    assert found["runs"].keys() == {"lightning_logs/version_0", "lightning_logs/version_1"}
    assert {run["status"] for run in found["runs"].values()} == {"FINISHED"}
    run = found["runs"][str(RUN)]
    assert run["params"]["config/n_embd"] == "16" and run["params"]["batch_size"] == "8"
    assert run["params"]["optimizer/lr"] == "0.0006", "what it began with"
    assert dict(run["curves"]["train/loss"]) == pytest.approx(tensorboard_losses())
    assert [step for step, _ in run["curves"]["val/loss"]] == [2, 4, 6]
    assert status == 2
    assert said.strip().splitlines()[-1].startswith("lit_gpt: error: trainer.logger=mlflow cannot be set up: ")
    assert len(list(folder.rglob("version_*"))) == 2, "what could not be set up made no folder"
    names = {path.name for path in folder.iterdir()}
    assert names == {"lightning_logs", "settings.yaml", "text.py", "tokens"}, "nothing elsewhere"


@pytest.mark.slow
def test_wandb_writes_an_offline_run_in_the_runs_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    fit("wandb")
    assert "wandb: offline; `wandb sync lightning_logs/version_0/wandb/offline-run-*`" in capsys.readouterr().err
    found = offline_records(RUN)
    assert [step for step, values in found["history"] if "train/loss" in values] == [1, 2, 3, 4]
    losses = {step: values["train/loss"] for step, values in found["history"] if "train/loss" in values}
    assert losses == pytest.approx(tensorboard_losses())
    assert found["config"]["batch_size"] == 8
    identity = (RUN / "wandb_run.txt").read_text().strip()
    assert len(list(RUN.glob(f"wandb/offline-run-*-{identity}"))) == 1
    names = {path.name for path in folder.iterdir()}
    assert names == {"lightning_logs", "settings.yaml", "text.py", "tokens"}, "nothing elsewhere"


def offline_records(run: Path) -> dict[str, Any]:
    """What the file of an offline run holds: its configuration and its history."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    config, history = dict[str, Any](), []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        updates = [*record.run.config.update, *record.config.update]
        config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if items:
            history.append((items.get("trainer/global_step"), items))
    return {"config": config, "history": history}


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which wandb's is after a header of 7 bytes."""
    block, header, position, parts = 32768, 7, 7, b""
    while position + header <= len(data):
        left = block - position % block
        if left < header:
            position += left
            continue
        size, kind = struct.unpack("<HB", data[position + 4 : position + header])
        parts += data[position + header : position + header + size]
        position += header + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
