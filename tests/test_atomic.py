"""Files that appear whole: permissions, links, and what killed processes leave."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from lit_gpt.checkpoint.format import save_checkpoint
from lit_gpt.files.atomic import atomic_write, remove_unfinished


def test_the_umask_of_other_threads_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one for the process: set from one thread for a moment, it opens the files of another to all."""

    def refuse(mask: int) -> int:
        raise AssertionError("the umask is set")

    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", refuse)
        threads = [threading.Thread(target=save_checkpoint, args=(tmp_path / f"{i}.ckpt", {})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_link_to_elsewhere_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "run").mkdir()
    link, target = tmp_path / "run/last.ckpt", tmp_path / "large_disk/last.ckpt"
    link.symlink_to("../large_disk/last.ckpt")
    for content in (b"first", b"second"):  # the first while the link names nothing
        with atomic_write(link) as file:
            file.write(content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert [path.name for path in (tmp_path / "large_disk").iterdir()] == ["last.ckpt"]


def test_a_link_to_a_file_beside_it_is_replaced_and_that_file_kept(tmp_path: Path) -> None:
    (tmp_path / "step=1.ckpt").write_bytes(b"kept")
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    with atomic_write(tmp_path / "last.ckpt") as file:
        file.write(b"new")
    assert (tmp_path / "step=1.ckpt").read_bytes() == b"kept"
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"
    assert not (tmp_path / "last.ckpt").is_symlink()


def test_what_killed_processes_left_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for _ in range(2):
        if not (child := os.fork()):
            with atomic_write(tmp_path / "last.ckpt") as file:
                file.write(b"half")
                os._exit(9)
        os.waitpid(child, 0)
    (tmp_path / "last.ckpt").write_bytes(b"whole")
    (tmp_path / ".config").write_bytes(b"")
    assert len(list(tmp_path.glob(".last.ckpt.*"))) == 2
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config", "last.ckpt"]
