"""Resuming, with real processes: the very next sample, on any number of ranks, and the same bits on the same ones."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import Child, ForkServer

from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.resume import align_progress
from lit_gpt.data.shards import write_shard
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import get_tokenizer

TESTS = Path(__file__).resolve().parent
EPOCH = 5  # optimizer steps of 8 samples


def make_data(folder: Path, seed: int = 0) -> None:
    """Random bytes: 43 samples of 16, so that 3 are left over in each epoch."""
    tokenizer = get_tokenizer("byte")
    generator, shards = np.random.default_rng(seed), []
    for name, count in [("train_000000.bin", 300), ("train_000001.bin", 410), ("val_000000.bin", 40)]:
        with write_shard(folder / name, "uint16") as writer:
            writer.add(generator.integers(0, 256, count))
        shards.append(writer.shard)
    tokenizer.save(folder / "tokenizer.json")
    ShardIndex("uint16", tuple(shards), "byte", tokenizer.hash, tokenizer.n_vocab).save(folder)


def start(fork_server: ForkServer, *runs: dict[str, Any]) -> Child:
    return fork_server.start(TESTS / "resume_driver.py", json.dumps(runs))


def finish(process: Child) -> None:
    done = process.finish()
    assert done.returncode == 0, done.stderr[-3000:]


def samples(root: Path) -> dict[int, list[str]]:
    """Optimizer step → the samples that all ranks gave to it, sorted. Steps begun again count once."""
    steps: dict[int, list[str]] = {}
    for path in root.glob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            steps.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in steps.items()}


def assert_same_bits(one: Path, other: Path) -> None:
    weights = [torch.load(root / "weights.pt", weights_only=True) for root in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def assert_goes_on(base: Path, resumed: Path, step: int) -> None:
    """A run resumed after `step` steps did the rest of `base`, and nothing else."""
    expected = {number: rows for number, rows in samples(base).items() if number >= step}
    assert samples(resumed) == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path, fork_server: ForkServer) -> Path:
    """A folder of runs on one rank; `whole` was never stopped: two and a half epochs, two micro-batches a step."""
    root = tmp_path_factory.mktemp("runs")
    common = {"folder": str(data), "max_epochs": 3}  # so that configure_optimizers asks for the number of steps

    def resumed(name: str, ckpt: str, **options: Any) -> dict[str, Any]:
        return {**common, "root": str(root / name), "ckpt_path": str(root / ckpt), **options}

    limited = {"limit_train_batches": 6, "max_epochs": 5}
    finish(
        start(
            fork_server,
            {**common, "root": str(root / "whole"), "save_at_batch": 6},
            resumed("from 3", "whole/step3.ckpt"),
            resumed("from the last batch", f"whole/step{EPOCH}.ckpt"),
            resumed("from validation", f"whole/validated{EPOCH}.ckpt"),
            resumed("from the edge", f"whole/epoch{EPOCH}.ckpt"),
            resumed("from 7", "whole/step7.ckpt"),
            resumed("again", "from 3/step8.ckpt"),
            resumed("middle of a step", "whole/middle.ckpt"),
            {**common, "root": str(root / "limited"), **limited},
            resumed("limited from 3", "limited/step3.ckpt", **limited),
            resumed("limited from 7", "limited/step7.ckpt", **limited),
        )
    )
    return root


RESUMED = {
    "from 3": ("whole", 3),
    "from the last batch": ("whole", EPOCH),
    "from validation": ("whole", EPOCH),
    "from the edge": ("whole", EPOCH),
    "from 7": ("whole", 7),
    "again": ("whole", 8),
    "middle of a step": ("whole", 3),
    "limited from 3": ("limited", 3),
    "limited from 7": ("limited", 7),
}


@pytest.mark.slow
def test_resumed_on_one_rank(base: Path) -> None:
    for name, (whole, step) in RESUMED.items():  # one test, or each worker of a parallel run would make the runs
        assert_goes_on(base / whole, base / name, step)
        assert_same_bits(base / whole, base / name)


@pytest.mark.slow
def test_an_epoch_repeats_nothing(base: Path) -> None:
    for run, first in [("whole", 0), ("whole", EPOCH), ("limited", 0)]:
        seen = [row for step in range(first, first + EPOCH) for row in samples(base / run)[step]]
        assert len(seen) == len(set(seen)) == 8 * EPOCH
    assert samples(base / "whole") == samples(base / "limited")  # where Lightning's epochs end changes nothing
    assert samples(base / "whole")[0] != samples(base / "whole")[EPOCH]


@pytest.mark.slow
def test_four_ranks_killed_and_one_four_two(base: Path, data: Path, tmp_path: Path, fork_server: ForkServer) -> None:
    common = {"folder": str(data), "ranks": 4, "max_steps": 9, "max_epochs": -1}
    killed = start(fork_server, {**common, "root": str(tmp_path / "killed"), "wait_at_step": 4})
    whole = start(fork_server, {**common, "root": str(tmp_path / "whole")})
    try:
        deadline = time.monotonic() + 250
        while not (tmp_path / "killed" / "step4.ckpt").exists() and time.monotonic() < deadline:
            assert killed.poll() is None, killed.output()[1][-3000:]
            time.sleep(0.1)
    finally:
        killed.kill()
    finish(whole)
    finish(
        start(
            fork_server,
            {**common, "root": str(tmp_path / "resumed"), "ckpt_path": str(tmp_path / "killed" / "step4.ckpt")},
            {
                **{**common, "root": str(tmp_path / "four"), "ckpt_path": str(base / "whole" / "step2.ckpt")},
                **{"max_steps": 7, "accumulate": 1, "batch_size": 8},
            },
            {**common, "root": str(tmp_path / "two"), "ckpt_path": str(tmp_path / "four" / "step7.ckpt"), "ranks": 2},
        )
    )
    assert_goes_on(tmp_path / "whole", tmp_path / "resumed", 4)
    assert_same_bits(tmp_path / "whole", tmp_path / "resumed")
    one = samples(base / "whole")
    assert samples(tmp_path / "whole") == {step: rows for step, rows in one.items() if step < 9}
    assert samples(tmp_path / "four") == {step: one[step] for step in range(2, 7)}
    assert samples(tmp_path / "two") == {step: one[step] for step in range(7, 9)}


def test_other_data_or_order_refuses(data: Path, tmp_path: Path) -> None:
    make_data(tmp_path / "other", seed=1)
    state = _module(data).state_dict()
    for changes, message in [
        ({"path": str(tmp_path / "other")}, "not those that the run was trained on"),
        ({"seed": 2}, "data.seed"),
        ({"block_size": 8}, "data.block_size"),
        ({"shuffle_tokens": 64}, "data.shuffle_tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            _module(data, **changes).load_state_dict(state)
    make_data(tmp_path / "copy")
    _module(tmp_path / "copy").load_state_dict(state)  # the same tokens elsewhere are the same


def _module(folder: Path, **options: Any) -> TokenDataModule:
    module = TokenDataModule(**{"path": str(folder), "batch_size": 4, "block_size": 16, **options})
    module.setup("fit")
    return module


def test_progress_counts_whole_steps() -> None:
    def aligned(ready: int, processed: int, completed: int, old: int, new: int) -> tuple[int, int]:
        counts = {"ready": ready, "started": ready, "processed": processed, "completed": completed}
        loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": dict(counts), "current": counts}}}
        align_progress({"TokenDataModule": {"accumulate": old}, "loops": loops}, new)
        return counts["ready"], counts["completed"]

    assert aligned(6, 6, 6, 2, 2) == (6, 6)
    assert aligned(6, 6, 5, 2, 2) == (6, 5)  # saved in on_train_batch_end
    assert aligned(7, 7, 7, 2, 2) == aligned(7, 7, 6, 2, 2) == (6, 6)  # the unfinished step begins again
    assert aligned(6, 5, 5, 2, 2) == (4, 4)  # it failed in the step's last micro-batch
    assert aligned(6, 6, 6, 2, 1) == (3, 3) and aligned(3, 3, 2, 1, 4) == (12, 11)
