"""Readers of a folder of shards and `prepare` are kept apart, and a folder that cannot be written to can be read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from environment import ROOT, RunProgram
from fork_server import ForkServer
from preparing import CODE, files, write

from lit_gpt.__main__ import main
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.inspect_shards import check
from lit_gpt.data.prepare import prepare
from lit_gpt.data.prepare_state import locked
from lit_gpt.data.shard_folder import load_index, open_local_split, open_tokens
from lit_gpt.errors import UserError

READ = """
import os, sys
from lit_gpt.data.datamodule import TokenDataModule
data = TokenDataModule(sys.argv[1], batch_size=1, block_size=8)
data.setup("fit")
os.mkdir(sys.argv[2])
open(sys.argv[3]).close()  # waits for the pipe's other end
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "x.txt", CODE * 99)


@pytest.fixture
def folder(text: Path, tmp_path: Path) -> Path:
    prepare(str(text), tmp_path / "out", tokenizer="byte")
    return tmp_path / "out"


@pytest.mark.slow
def test_overwrite_is_refused_while_a_run_reads(
    folder: Path,
    program: RunProgram,
    fork_server: ForkServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(folder)
    os.mkfifo(tmp_path / "end")
    reading = tmp_path / "reading"
    reader = fork_server.start(write(tmp_path / "read.py", READ), folder, reading, tmp_path / "end", cwd=ROOT)
    while not reading.exists():
        assert reader.poll() is None, reader.output()[1]
        time.sleep(0.02)
    arguments = ("prepare", "x.txt", "--output", str(folder), "--overwrite", "--tokenizer")
    done = program(*arguments, "char")
    assert done.returncode == 2 and "another program is reading its shards; wait for it to end" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert files(folder) == before
    assert main(["prepare", "x.txt", "--output", str(folder), "--tokenizer", "byte"]) == 0
    assert "already holds exactly this" in capsys.readouterr().err  # nothing is written
    (tmp_path / "end").write_text("")
    assert reader.finish().returncode == 0
    assert main([*arguments, "char"]) == 0


def test_a_reader_is_refused_while_prepare_writes(folder: Path) -> None:
    data = TokenDataModule(str(folder), batch_size=1, block_size=8)
    with locked(folder):
        for read in (lambda: open_tokens(folder, "train"), lambda: data.setup("fit"), lambda: check(str(folder))):
            with pytest.raises(UserError, match="lit_gpt prepare is writing to it; wait for it to end") as caught:
                read()
            assert "\n" not in str(caught.value)
    data.setup("fit")


def test_shards_that_were_replaced_after_their_index_was_read(text: Path, folder: Path) -> None:
    index = load_index(folder)
    prepare(str(text), folder, tokenizer="char", overwrite=True)
    with pytest.raises(UserError, match="has replaced its shards just now"):
        open_local_split(index, "train", folder)


@pytest.mark.slow
def test_a_reader_that_nothing_uses_any_more_is_none(text: Path, folder: Path) -> None:
    stream = open_tokens(folder, "train")
    cycle = [stream]
    cycle.append(cycle)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another program is reading"):
        prepare(str(text), folder, tokenizer="char", overwrite=True)
    del stream, cycle
    prepare(str(text), folder, tokenizer="char", overwrite=True)


def test_a_folder_that_cannot_be_written_to_can_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lock in (True, False):  # one left by an earlier reader, or none
        (folder / ".lock").touch() if lock else (folder / ".lock").unlink()
        os_open = os.open

        def read_only(path: object, flags: int, *rest: int, real: object = os_open) -> int:
            if flags & (os.O_RDWR | os.O_CREAT):
                raise PermissionError(13, "Permission denied")
            return real(path, flags, *rest)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", read_only)
            assert len(open_tokens(folder, "train").read(0, 5)) == 5
        assert (folder / ".lock").exists() is lock


def test_a_folder_that_is_no_data_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for read in (lambda: open_tokens(tmp_path / "other", "train"), lambda: check(str(tmp_path / "other"))):
        with pytest.raises(UserError, match=r"no (train|token) shards"):
            read()
    assert list((tmp_path / "other").iterdir()) == []
