"""What is resolved before the Trainer is built."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import Namespace

from lit_gpt.cli.resolve import _write_only_where_asked, rank_count
from lit_gpt.data.prepare import prepare
from lit_gpt.data.remote import RemoteFolder
from lit_gpt.errors import UserError


@pytest.mark.parametrize(
    ("devices", "num_nodes", "expected"),
    [(2, 1, 2), ("2", 3, 6), ([0, 2, 3], 1, 3), ("0,2,", 2, 4), ("auto", 2, 2), (-1, 1, 1)],
)
def test_ranks_are_counted_from_every_form_of_devices(
    devices: int | str | list[int], num_nodes: int, expected: int
) -> None:
    assert rank_count(Namespace(devices=devices, num_nodes=num_nodes, accelerator="cpu")) == expected


def test_folders_that_only_a_checkpoint_names_are_not_written_to(tmp_path: Path) -> None:
    """validate prepared text that the checkpoint named into a folder that the checkpoint named."""
    folder, source = tmp_path / "planted", tmp_path / "x.txt"
    source.write_text("to be or not to be\n" * 50)
    data = Namespace(path=str(folder), source=str(source), cache_dir=None)
    with pytest.raises(UserError, match=r"planted, which the checkpoint names, has no token shards: give --data.path"):
        _write_only_where_asked(data, frozenset())
    assert not folder.exists()
    _write_only_where_asked(data, frozenset({"path"}))
    prepare(str(source), folder, "byte")
    _write_only_where_asked(data, frozenset())


def test_a_cache_that_only_a_checkpoint_names_is_used_if_it_has_been_before(tmp_path: Path) -> None:
    url, cache = "http://127.0.0.1:9/x", str(tmp_path / "cache")
    for asked, expected in ((frozenset(), None), (frozenset({"cache_dir"}), cache)):
        data = Namespace(path=url, source=None, cache_dir=cache)
        _write_only_where_asked(data, asked)
        assert data.cache_dir == expected
    RemoteFolder(url, cache).folder.mkdir(parents=True)
    data = Namespace(path=url, source=None, cache_dir=cache)
    _write_only_where_asked(data, frozenset())
    assert data.cache_dir == cache
