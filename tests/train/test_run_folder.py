"""Run folders reserved and locked, and what a resume that fails half-way does to the checkpoint that it began from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from training import Batches, module, trainer

from lit_gpt.errors import UserError
from lit_gpt.files.locks import Lock
from lit_gpt.train.callbacks.checkpoints import LastCheckpoint
from lit_gpt.train.optim import OptimizerConfig
from lit_gpt.train.run_folder import folder_of, lock, reserve


def test_runs_started_together_get_a_folder_each(tmp_path: Path) -> None:
    (tmp_path / "version_6").mkdir()
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(reserve, [tmp_path] * 16))
    assert sorted(path.name for path in folders) == sorted(f"version_{number}" for number in range(7, 23))


def test_a_root_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"no run folder can be made .*; choose another --trainer.default_root_dir"):
        reserve(tmp_path / "file" / "lightning_logs")


def test_only_a_checkpoint_of_a_run_has_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    assert folder_of(checkpoint) is None, "a folder of checkpoints that somebody has collected"
    (tmp_path / "run/config.yaml").write_text("")
    assert folder_of(checkpoint) == folder_of(Path("run/checkpoints/last.ckpt")) == tmp_path / "run"
    assert folder_of(tmp_path / "run/last.ckpt") is None


def fit(folder: Path, callbacks: list[Callback], ckpt: Path | None = None, steps: int = 3, **options: Any) -> None:
    run = trainer(
        folder, max_steps=steps, logger=False, enable_checkpointing=True, default_root_dir=folder, callbacks=callbacks
    )
    run.fit(module(**options), Batches(24, 4), ckpt_path=ckpt)


class Fail(Callback):
    """Fails in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: Any) -> None:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("fault", ["optimizer", "on_fit_start", "on_train_start", "on_train_batch_start"])
def test_a_resume_that_fails_before_its_first_step_saves_nothing(tmp_path: Path, fault: str) -> None:
    """Lightning restores the loops, then the optimizer: what it held between was saved over the good file."""
    fit(tmp_path, [LastCheckpoint()])
    last = tmp_path / "checkpoints/last.ckpt"
    before, written = last.read_bytes(), last.stat().st_mtime_ns
    with pytest.raises((ArithmeticError, ValueError, KeyError)):
        if fault == "optimizer":
            fit(tmp_path, [LastCheckpoint()], last, steps=6, optimizer=OptimizerConfig(name="muon"))
        else:
            fit(tmp_path, [Fail(fault), LastCheckpoint()], last, steps=6)
    assert last.read_bytes() == before
    assert last.stat().st_mtime_ns == written
    with lock(tmp_path):  # it is free again
        pass


def test_a_second_run_in_one_folder_is_refused_without_the_programs_help(tmp_path: Path) -> None:
    with Lock(tmp_path, ""), pytest.raises(UserError, match="another run is writing to it"):
        fit(tmp_path, [LastCheckpoint()])
    left = tmp_path / "checkpoints/.last.ckpt.abc.partial"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half")
    fit(tmp_path, [LastCheckpoint()])
    assert [path.name for path in left.parent.iterdir()] == ["last.ckpt"]
