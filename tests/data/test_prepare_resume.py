"""prepare, interrupted: by kills, by a full disk, by a worker that dies; and folders that hold something already."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from environment import ROOT
from fork_server import ForkServer
from preparing import CODE, OPTIONS, die_at, files, in_a_child, write

from lit_gpt.data import prepare as module
from lit_gpt.data.prepare import prepare
from lit_gpt.data.shard_folder import load_index
from lit_gpt.errors import UserError

pytestmark = pytest.mark.usefixtures("small_jobs")


@pytest.mark.slow
def test_killed_at_every_file_it_goes_on_and_ends_the_same(corpus: Path, reference: Path, tmp_path: Path) -> None:
    def run(call: int, before: bool) -> None:
        die_at(call, before)
        prepare(str(corpus), tmp_path / "out", **OPTIONS)

    # State, tokenizer, three times two shards and the state, index: each run dies a little later than the last.
    kills = next(kills for kills in range(20) if not in_a_child(partial(run, 1 + kills // 2, kills % 2 == 0)))
    assert kills > 6
    assert files(tmp_path / "out") == files(reference)


@pytest.mark.slow
def test_finished_shards_are_kept_and_not_written_again(corpus: Path, reference: Path, tmp_path: Path) -> None:
    def run() -> None:
        die_at(7, before=True)
        prepare(str(corpus), tmp_path / "out", **OPTIONS)

    assert in_a_child(run) == signal.SIGKILL
    with pytest.raises(UserError, match="was not finished; run the same lit_gpt prepare again"):
        load_index(tmp_path / "out")
    finished = [shard["name"] for shard in json.loads((tmp_path / "out/prepare.json").read_text())["shards"]]
    before = {name: (tmp_path / "out" / name).stat() for name in finished}
    assert len(finished) == 2
    prepare(str(corpus), tmp_path / "out", **OPTIONS)
    for name, status in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)  # the very files
    assert files(tmp_path / "out") == files(reference)


WITH_WORKERS = """
import sys
from preparing import cut_small, die_at
from lit_gpt.__main__ import main
from lit_gpt.data import prepare

cut_small(setattr)
prepare.BYTES_PER_WORKER = 1
if sys.argv[1] == "die":
    die_at(7, before=True)
sys.exit(main(["prepare", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_the_program_is_killed_while_workers_tokenize(
    corpus: Path, reference: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    script = write(tmp_path / "with_workers.py", WITH_WORKERS)
    flags = [f"--{name}={value}" for name, value in {**OPTIONS, "workers": 2}.items()]
    words = (corpus, "--output", "out", *flags)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    killed = fork_server.run(script, "die", *words, cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL  # not its workers, which end by themselves
    assert (tmp_path / "out/train_000000.bin").exists() and not (tmp_path / "out/index.json").exists()
    done = fork_server.run(script, "go on", *words, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(reference)


def test_overwrite_begins_anew_and_only_then(corpus: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "out")
    text = write(tmp_path / "x.txt", CODE * 99)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds shards made otherwise: .* --overwrite"):
        prepare(str(text), tmp_path / "out", tokenizer="byte")
    with pytest.raises(UserError, match="not UTF-8"):  # bad input is found before anything is removed
        prepare(str(write(tmp_path / "bad.txt.gz", gzip.compress(b"\xff"))), tmp_path / "out", "byte", overwrite=True)
    assert files(tmp_path / "out") == before
    prepare(str(text), tmp_path / "out", tokenizer="byte", overwrite=True)
    assert sorted(files(tmp_path / "out")) == [
        "index.json",
        "prepare.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_a_changed_input_is_not_mixed_with_what_is_there(tmp_path: Path) -> None:
    text = write(tmp_path / "x.txt", CODE * 99)
    prepare(str(text), tmp_path / "out", tokenizer="byte")
    write(text, CODE * 100)
    with pytest.raises(UserError, match="made otherwise"):
        prepare(str(text), tmp_path / "out", tokenizer="byte")
    write(tmp_path / "foreign" / "train.bin", b"12")
    with pytest.raises(UserError, match="already holds shards"):
        prepare(str(text), tmp_path / "foreign", tokenizer="byte")


@pytest.mark.slow
def test_two_at_once_do_not_write_to_one_folder(tmp_path: Path) -> None:
    from lit_gpt.data.prepare_state import locked

    text = write(tmp_path / "x.txt", CODE * 99)
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another lit_gpt prepare is writing"):
        prepare(str(text), tmp_path / "out", tokenizer="byte")


# ---------------------------------------------------------------- a full disk, a dead worker


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_whole_and_goes_on(corpus: Path, reference: Path, tmp_path: Path) -> None:
    limit = (reference / "train_000000.bin").stat().st_size

    def run() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 5000, limit - 5000))  # EFBIG from the kernel
        try:
            prepare(str(corpus), tmp_path / "small", **OPTIONS)
        except UserError as error:
            write(tmp_path / "message", str(error)[:4000])

    in_a_child(run)
    message = (tmp_path / "message").read_text()
    assert "the disk is full (File too large)" in message and "nothing was kept" in message
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_a_disk_that_fills_later_keeps_the_finished_shards(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) == 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"disk is full .* finished shards are kept"):
        patch.setattr(os, "fsync", full)
        prepare(str(corpus), tmp_path / "out", **OPTIONS)
    assert not [name for name in files(tmp_path / "out") if name.endswith(".partial")]
    assert not (tmp_path / "out/index.json").exists()
    prepare(str(corpus), tmp_path / "out", **OPTIONS)
    assert files(tmp_path / "out") == files(reference)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_and_not_a_wait(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_gpt.data import workers

    monkeypatch.setattr(module, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(workers, "START", "import sys; sys.stdin.buffer.read(1); sys.exit(7)")
    with pytest.raises(RuntimeError, match="ended with status 7"):
        prepare(str(corpus), tmp_path / "out", **{**OPTIONS, "workers": 2})
