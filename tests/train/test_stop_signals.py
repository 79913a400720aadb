"""SIGTERM and Ctrl+C: at most one more batch, on all ranks, a status that says so, and nothing lost or half-made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import stop_driver
import torch
from fork_server import ForkServer
from lightning.pytorch.callbacks import Callback
from training import TINY, Batches, module, trainer

from lit_gpt.checkpoint.format import load_checkpoint, read_header
from lit_gpt.train.callbacks.checkpoints import LastCheckpoint
from lit_gpt.train.callbacks.stop_signals import ExitOnSigterm
from lit_gpt.train.lightning_fixes import repeat_unfinished_validation
from lit_gpt.train.module import LitGPT
from lit_gpt.train.optim import OptimizerConfig

HERE = Path(__file__).resolve().parent
TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)


def start(fork_server: ForkServer, folder: Path, **asked: Any) -> subprocess.CompletedProcess[str]:
    """A process for each rank, and how rank 0 ended."""
    return fork_server.run_ranks(asked.get("devices", 1), HERE / "stop_driver.py", folder, json.dumps(asked))[0]


def validated(folder: Path, rank: int = 0) -> list[tuple[int, int]]:
    """(step, batch) of the validation batches that were begun."""
    lines = (folder / f"validated_{rank}.txt").read_text().splitlines()
    return [(int(step), int(batch)) for step, batch in map(str.split, lines)]


def last_of(folder: Path) -> Path:
    return next(folder.rglob("last.ckpt"))


def metrics(folder: Path, column: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        if column in rows[0]:
            at, step = rows[0].index(column), rows[0].index("step")
            found |= {int(row[step]): float(row[at]) for row in rows[1:] if row[at]}
    return found


def stop_in_validation(folder: Path, number: int, status: int) -> None:
    """A run that a signal ends in its second validation."""
    with pytest.raises(SystemExit) as ended:
        stop_driver.main(folder, "validation", [number])
    assert ended.value.code == status
    assert validated(folder) == [*((6, batch) for batch in range(8)), (12, 0), (12, 1)]
    assert read_header(last_of(folder)).step == 12


@pytest.mark.slow
def test_ctrl_c_stops_a_run_in_a_validation_as_sigterm_does(tmp_path: Path) -> None:
    stop_in_validation(tmp_path, INT, 130)


@pytest.mark.slow
def test_a_run_stopped_in_a_validation_begins_it_again(tmp_path: Path) -> None:
    """It waited for the whole validation and one more step; resumed, it skipped that validation."""
    stop_driver.main(tmp_path / "whole")
    stop_in_validation(tmp_path / "first", TERM, 143)
    stop_driver.main(tmp_path / "second", ckpt_path=str(last_of(tmp_path / "first")))
    assert validated(tmp_path / "second") == [(step, batch) for step in (12, 18) for batch in range(8)]
    whole, *parts = (tmp_path / name for name in ("whole", "first", "second"))
    for column in ("val/loss", "train/loss"):
        assert metrics(whole, column) == {**metrics(parts[0], column), **metrics(parts[1], column)}
    weights = [load_checkpoint(last_of(folder))["state_dict"] for folder in (whole, parts[1])]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    again = tmp_path / "again"  # a run that was resumed so is resumed as any other
    stop_driver.main(again, ckpt_path=str(last_of(parts[1])))
    assert not (again / "validated_0.txt").exists()


def final_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Loops, the weights of best.ckpt, and its score."""
    last = load_checkpoint(last_of(folder))
    best = load_checkpoint(last_of(folder).with_name("best.ckpt"))
    (state,) = (state for name, state in last["callbacks"].items() if "'val/loss'" in name)
    return last["loops"], best["state_dict"], float(state["best_model_score"])


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{"max_steps": 18, "max_epochs": -1}, {"max_epochs": 3}])
def test_a_run_stopped_in_its_last_validation_ends_as_if_it_had_not(limits: dict[str, int], tmp_path: Path) -> None:
    """With all steps made it ended at once: no last validation, no best.ckpt of it."""
    stop_driver.main(tmp_path / "whole", limits=limits)
    with pytest.raises(SystemExit):
        stop_driver.main(tmp_path / "first", "validation", [TERM], step=18, limits=limits)
    assert validated(tmp_path / "first")[-2:] == [(18, 0), (18, 1)]
    folder = last_of(tmp_path / "first").parent
    stop_driver.main(tmp_path / "first", ckpt_path=str(folder / "last.ckpt"), limits=limits, into=folder)
    assert validated(tmp_path / "first")[-8:] == [(18, batch) for batch in range(8)]
    loops, best, score = final_state(tmp_path / "first")
    expected_loops, expected_best, expected_score = final_state(tmp_path / "whole")
    assert score == expected_score
    assert all(torch.equal(weight, best[name]) for name, weight in expected_best.items())
    assert loops == expected_loops


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 32])
def test_a_last_validation_that_is_no_more_wanted_is_not_repeated(rows: int, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        stop_driver.main(tmp_path, "validation", [TERM], step=18, limits={"max_steps": 18})
    limits = {"max_steps": 18, "limit_val_batches": 0 if rows else 1.0}
    stop_driver.main(tmp_path, ckpt_path=str(last_of(tmp_path)), limits=limits, rows=rows)
    assert validated(tmp_path)[-2:] == [(18, 0), (18, 1)]
    assert {read_header(path).step for path in tmp_path.rglob("*.ckpt")} == {12, 18}


@pytest.mark.slow
def test_the_best_checkpoint_may_be_of_a_validation_that_was_stopped(tmp_path: Path) -> None:
    """The repeated validation did not save it: a checkpoint of that step was there."""
    with pytest.raises(SystemExit):
        stop_driver.main(tmp_path, "validation", [TERM], step=12)
    folder = last_of(tmp_path).parent
    stop_driver.main(tmp_path, ckpt_path=str(folder / "last.ckpt"), limits={"max_steps": 13}, into=folder)
    assert read_header(folder / "best.ckpt").step == 12


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_and_saves_it(tmp_path: Path) -> None:
    """KeyboardInterrupt could come in the middle of an update, whose torn weights were saved."""
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has started the tests in the background
    with pytest.raises(SystemExit) as ended:
        stop_driver.main(tmp_path, "train", [INT])
    assert ended.value.code == 130
    assert read_header(last_of(tmp_path)).step == 8
    assert signal.getsignal(signal.SIGINT) is before, "put back"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_with_the_last_checkpoint_whole(fork_server: ForkServer, tmp_path: Path) -> None:
    done = start(fork_server, tmp_path, where="train", signals=[INT, INT])
    assert done.returncode == 130
    assert "interrupted twice: ended without saving" in done.stderr
    assert read_header(last_of(tmp_path)).step == 6
    load_checkpoint(last_of(tmp_path))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_within_a_batch_of_validation(fork_server: ForkServer, tmp_path: Path) -> None:
    done = start(fork_server, tmp_path, where="validation", signals=[TERM], rank=1, devices=2)
    assert done.returncode == 143, done.stderr[-2000:]
    assert validated(tmp_path, 0)[-1] == validated(tmp_path, 1)[-1] == (12, 1)
    assert read_header(last_of(tmp_path)).step == 12


@pytest.mark.parametrize("where", ["validate", "test", "predict"])
def test_sigterm_ends_what_has_nothing_to_save_at_once(where: str, tmp_path: Path) -> None:
    """Lightning's handler lets a prediction run to its end, and leaves a validation with status 0."""
    seen: list[int] = []

    class Kill(Callback):
        def kill(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
            seen.append(batch_idx)
            if batch_idx == 1:
                os.kill(os.getpid(), TERM)

        on_validation_batch_start = on_test_batch_start = on_predict_batch_start = kill

    class Echo(LitGPT):
        def on_predict_start(self) -> None: ...

        def predict_step(self, batch: Any, batch_idx: int) -> Any: ...

    before = signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path, callbacks=[Kill(), ExitOnSigterm()], logger=False)
    with pytest.raises(SystemExit) as ended:
        getattr(run, where)(Echo(TINY), Batches(32, 4))
    assert (ended.value.code, seen) == (143, [0, 1])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_half_made_update_is_not_saved(tmp_path: Path) -> None:
    class Fail(Callback):
        """Fails after Muon has moved its weights and before AdamW has."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.optimizers[0].parts[1].step = self.fail

        def fail(self) -> None:
            raise MemoryError("in the middle of an update")

    saving = {"logger": False, "enable_checkpointing": True, "default_root_dir": tmp_path}
    run = trainer(tmp_path, max_epochs=2, callbacks=[Fail(), LastCheckpoint()], **saving)
    with pytest.raises(MemoryError):
        run.fit(module(optimizer=OptimizerConfig(name="muon")), Batches(24, 4), Batches(4, 4))
    assert read_header(last_of(tmp_path)).step == 6


@pytest.mark.parametrize(
    ("current", "total", "is_last", "expected"),
    [
        ((0, 0), (0, 0), False, ((0, 0), (0, 0))),  # none yet
        ((8, 8), (16, 16), True, ((8, 8), (16, 16))),  # finished
        ((8, 8), (17, 16), True, ((8, 8), (16, 16))),  # finished, having been begun again
        ((3, 3), (11, 11), False, ((0, 0), (9, 8))),  # stopped between two batches
        ((3, 2), (11, 10), False, ((0, 0), (9, 8))),  # stopped in a batch
    ],
)
def test_an_unfinished_validation_is_told_from_a_finished_one(
    current: tuple[int, int], total: tuple[int, int], is_last: bool, expected: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    def counts(begun: int, done: int) -> dict[str, int]:
        return {"ready": begun, "started": begun, "processed": done, "completed": done}

    state = {"current": counts(*current), "total": counts(*total), "is_last_batch": is_last}
    repeat_unfinished_validation({"epoch_loop.val_loop.batch_progress": state})
    assert (state["current"], state["total"]) == (counts(*expected[0]), counts(*expected[1]))
