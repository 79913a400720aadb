"""One writer or many readers, in this process and others, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from environment import ROOT

from lit_gpt.files.locks import InUse, Lock, lock_path

HOLD = """
import sys, time
from lit_gpt.files.locks import Lock
lock = Lock(sys.argv[1], "in use", shared=len(sys.argv) > 2)
print("held", flush=True)
time.sleep(600)
"""


def hold(target: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, str(target), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_is_gone_however_it_ends(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(InUse, match=rf"^wait for it \(process {process.pid} on .+\)$"):
            Lock(tmp_path, "wait for it")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with Lock(tmp_path, "wait for it") as lock:
        assert lock.held
    assert not lock.held
    assert lock.path == tmp_path / ".lock"


def test_readers_share_and_exclude_only_writers(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    process = hold(file, "shared")
    try:
        with Lock(file, "", shared=True) as reader:
            assert reader.held
        with pytest.raises(InUse):
            Lock(file, "read by others")
    finally:
        process.kill()
        process.communicate()
    with Lock(file, "written"), pytest.raises(InUse, match="written"):
        Lock(file, "written", shared=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.jsonl.lock"]


def test_a_started_program_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "held")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    lock.release()
    try:
        Lock(tmp_path, "still held").release()
    finally:
        child.communicate(b"\n")


def test_a_forked_process_shares_the_lock_and_does_not_free_it(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "held")
    child = os.fork()
    if not child:
        lock.release(remove=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(InUse):
        Lock(tmp_path, "held")
    lock.release()


def test_a_copy_holds_and_frees_nothing(tmp_path: Path) -> None:
    """Callbacks travel to the processes of a run by pickle."""
    with Lock(tmp_path, "held") as lock:
        copy = pickle.loads(pickle.dumps(lock))
        assert not copy.held
        copy.release(remove=True)
        with pytest.raises(InUse):
            Lock(tmp_path, "held")


def test_a_removed_lock_file_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before its holder removed it, locked after: two would hold the lock of one folder."""
    first = Lock(tmp_path, "held")
    flock = fcntl.flock

    def remove_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release(remove=True)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    second = Lock(tmp_path, "held")
    monkeypatch.undo()
    assert second.held
    with pytest.raises(InUse):
        Lock(tmp_path, "held")
    second.release(remove=True)
    assert not lock_path(tmp_path).exists()


def test_without_locks_in_the_file_system_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not Lock(tmp_path, "held").held
    assert "this file system has no locks" in caplog.text


def test_a_reader_of_a_folder_that_it_cannot_write_to_makes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def read_only(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    assert not Lock(tmp_path, "held", shared=True).held
    with pytest.raises(OSError, match="Read-only"):
        Lock(tmp_path, "held")
    monkeypatch.undo()
    Lock(tmp_path, "held").release()
    monkeypatch.setattr(os, "open", read_only)
    assert Lock(tmp_path, "held", shared=True).held
