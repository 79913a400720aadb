"""Shards behind an address, on a server of this machine that misbehaves on purpose."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from environment import ROOT
from fork_server import ForkServer
from preparing import write

from lit_gpt.data import remote
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.remote import RemoteFolder, version_of
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.data.shards import write_shard
from lit_gpt.data.token_stream import open_split
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import get_tokenizer

NAMES = ["train_000000.bin", "train_000001.bin", "train_000002.bin", "val_000000.bin"]


class Server(ThreadingHTTPServer):
    """Serves `folder`; `faults[name]` says what goes wrong with the next requests for a file, one after the other."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.served = folder, dict[str, list[str]](), Counter[str]()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments, directory=str(arguments[2].folder))  # type: ignore[arg-type,attr-defined]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        if not name.endswith((".bin", ".json")) or not (self.server.folder / name).exists():
            return super().do_GET()
        self.server.served[name] += 1
        waiting = self.server.faults.get(name, [])
        fault = waiting.pop(0) if waiting else ""
        if fault == "busy":
            return self.send_error(503)
        body = (self.server.folder / name).read_bytes()
        if fault == "endless":
            body *= 3
        if fault == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) // 2 if fault == "truncate" else len(body)))
        self.end_headers()
        if fault in ("truncate", "drop", "stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(2)
        if fault in ("drop", "stall"):
            self.close_connection = True


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "served"
    generator, shards, tokenizer = np.random.default_rng(0), [], get_tokenizer("byte")
    for name in NAMES:
        with write_shard(folder / name, "uint16") as writer:
            writer.add(generator.integers(0, 256, 5000))
        shards.append(writer.shard)
    tokenizer.save(folder / "tokenizer.json")
    ShardIndex("uint16", tuple(shards), "byte", tokenizer.hash, tokenizer.n_vocab).save(folder)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.4)
    server = Server(folder)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def cached(folder: RemoteFolder) -> list[str]:
    """What is in the cache beside lock and index, without the hashes in the names of shards."""
    names = (path.name for path in folder.folder.iterdir() if path.name not in (".lock", "index.json"))
    return sorted(re.sub(r"\.[0-9a-f]{32}\.bin$", ".bin", name) for name in names)


@pytest.mark.slow
def test_the_same_batches_as_from_a_folder(server: Server, tmp_path: Path) -> None:
    modules = [
        TokenDataModule(path, batch_size=4, block_size=32, shuffle_tokens=2048, cache_dir=str(tmp_path / "cache"))
        for path in (server.url + "/", str(server.folder))
    ]
    for module in modules:
        module.prepare_data()
        module.setup("fit")
    for loader in ("train_dataloader", "val_dataloader"):
        batches = [list(getattr(module, loader)()) for module in modules]
        assert len(batches[0]) == len(batches[1]) > 10
        assert all(torch.equal(one[0], other[0]) for one, other in zip(*batches))
    assert modules[0].tokenizer is not None and modules[0].tokenizer.name == "byte"
    assert modules[0].state_dict()["fingerprint"] == modules[1].state_dict()["fingerprint"]
    assert {server.served[name] for name in NAMES} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["busy", "drop", "truncate", "stall", "corrupt"])
def test_a_fault_that_passes(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = {name: [fault] for name in ("index.json", "train_000001.bin")}
    if fault == "corrupt":
        del server.faults["index.json"]  # its last byte is a line end: nothing to notice
    folder = RemoteFolder(server.url, tmp_path / "cache")
    index = folder.load_index()
    stream = open_split(index, "train", server.url, folder.locate, local=False)
    whole = open_tokens(server.folder, "train")
    assert np.array_equal(stream.read(0, len(whole)), whole.read(0, len(whole)))
    assert server.served["train_000001.bin"] == 2 and server.served["train_000000.bin"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("busy", "503"),
        ("drop", "payload|[Dd]isconnect|closed"),
        ("truncate", "truncated"),
        ("stall", "[Tt]imeout"),
        ("corrupt", "sha256"),
    ],
)
def test_a_fault_that_stays(
    server: Server, tmp_path: Path, fault: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.faults = {"train_000001.bin": [fault] * 99}
    folder = RemoteFolder(server.url, tmp_path / "cache")
    index = folder.load_index()
    with pytest.raises(UserError, match=reason) as caught:
        folder.locate(index.shards[1])
    assert f"{server.url}/train_000001.bin: cannot be fetched, tried 2 times" in str(caught.value)
    assert cached(folder) == []  # nothing half-fetched, whatever its name
    with pytest.raises(UserError, match="cannot be fetched"):
        open_split(index, "train", server.url, folder.locate, local=False).read(0, 6000)


def test_what_is_not_there(server: Server, tmp_path: Path) -> None:
    folder = RemoteFolder(server.url, tmp_path / "cache")
    index = folder.load_index()
    (server.folder / NAMES[2]).unlink()
    with pytest.raises(UserError, match=r"train_000002.bin: not there, but index.json lists it"):
        folder.locate(index.shards[2])
    with pytest.raises(UserError, match=r"no index.json there"):
        RemoteFolder(f"{server.url}/nowhere", tmp_path / "cache").load_index()
    with pytest.raises(UserError, match="nonsense"):
        RemoteFolder("nonsense://x", tmp_path / "cache").load_index()


def test_a_name_that_leaves_the_cache_is_refused(server: Server, tmp_path: Path) -> None:
    text = (server.folder / "index.json").read_text()
    (server.folder / "index.json").write_text(text.replace("train_000000.bin", "../train_000000.bin"))
    with pytest.raises(UserError, match="is not a file name"):
        RemoteFolder(server.url, tmp_path / "cache").load_index()


def test_a_public_set_without_an_index(server: Server, tmp_path: Path) -> None:
    (server.folder / "index.json").unlink()
    folder = RemoteFolder(server.url, tmp_path / "cache")
    index = folder.load_index()
    assert [(shard.name, shard.tokens) for shard in index.shards] == [(name, 5000) for name in NAMES]
    whole = open_tokens(server.folder, "val")
    stream = open_split(index, "val", server.url, folder.locate, local=False)
    assert np.array_equal(stream.read(0, 5000), whole.read(0, 5000))


def test_the_least_recently_used_goes(server: Server, tmp_path: Path) -> None:
    folder = RemoteFolder(server.url, tmp_path / "cache", cache_gb=2.5 * 11_024 / 1e9)  # two fit
    zero, one, two = folder.load_index().shards[:3]
    for shard in (zero, one, zero, two):  # zero was used after one
        folder.locate(shard)
        time.sleep(0.01)
    assert cached(folder) == [zero.name, two.name]


def test_an_open_shard_can_be_read_after_it_went(server: Server, tmp_path: Path) -> None:
    folder = RemoteFolder(server.url, tmp_path / "cache", cache_gb=1e-9)
    stream = open_split(folder.load_index(), "train", server.url, folder.locate, local=False)
    whole = open_tokens(server.folder, "train")
    for start in (0, 5000, 10, 10_000, 20):
        assert np.array_equal(stream.read(start, 100), whole.read(start, 100))
    assert cached(folder) == [NAMES[2]]


def test_fetched_ahead(server: Server, tmp_path: Path) -> None:
    folder = RemoteFolder(server.url, tmp_path / "cache")
    folder.prefetch(list(folder.load_index().shards[1:3]))
    for _ in range(500):
        if cached(folder) == NAMES[1:3]:
            break
        time.sleep(0.02)
    assert cached(folder) == NAMES[1:3]


@pytest.mark.slow
def test_several_processes_download_once(server: Server, tmp_path: Path, fork_server: ForkServer) -> None:
    code = (
        "import sys; from lit_gpt.data.remote import RemoteFolder\n"
        "folder = RemoteFolder(sys.argv[1], sys.argv[2])\n"
        "for shard in folder.load_index().shards: folder.locate(shard)"
    )
    words = (write(tmp_path / "download.py", code), server.url, tmp_path / "cache")
    processes = [fork_server.start(*words, cwd=ROOT) for _ in range(3)]
    assert [process.finish(60).returncode for process in processes] == [0, 0, 0]
    assert {server.served[name] for name in NAMES} == {1}


# ---------------------------------------------------------------- the cache goes by content


def publish(folder: Path, seed: int, index: bool = True) -> None:
    """Shards of the same names and sizes with other tokens."""
    generator, shards, tokenizer = np.random.default_rng(seed), [], get_tokenizer("byte")
    for name in NAMES:
        with write_shard(folder / name, "uint16") as writer:
            writer.add(generator.integers(0, 256, 5000))
        shards.append(writer.shard)
        os.utime(folder / name, (seed, seed))  # the server tells whole seconds
    if index:
        ShardIndex("uint16", tuple(shards), "byte", tokenizer.hash, tokenizer.n_vocab).save(folder)


def read_all(server: Server, cache: Path) -> np.ndarray:
    folder = RemoteFolder(server.url, cache)
    stream = open_split(folder.load_index(), "train", server.url, folder.locate, local=False)
    return stream.read(0, len(stream))


@pytest.mark.slow
@pytest.mark.parametrize("index", [True, False])
def test_what_is_published_anew_is_fetched_anew(server: Server, tmp_path: Path, index: bool) -> None:
    """Shards went by name: a run trained on the old tokens under the new fingerprint."""
    if not index:
        (server.folder / "index.json").unlink()
    read_all(server, tmp_path / "cache")
    publish(server.folder, 1_000_000_000, index)
    new = open_tokens(server.folder, "train")
    for _ in range(2):
        assert np.array_equal(read_all(server, tmp_path / "cache"), new.read(0, len(new)))
    assert server.served[NAMES[0]] == (2 if index else 2 + 3)  # without an index each run reads the headers


def test_without_an_index_and_a_version_nothing_is_guessed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_header = Handler.send_header
    monkeypatch.setattr(
        Handler, "send_header", lambda self, key, value: key == "Last-Modified" or send_header(self, key, value)
    )
    (server.folder / "index.json").unlink()
    folder = RemoteFolder(server.url, tmp_path / "cache")
    shard = folder.load_index().shards[0]
    with pytest.raises(UserError, match=r"train_000000.bin: no index.json has its hash, .* no ETag") as caught:
        folder.locate(shard)
    assert "\n" not in str(caught.value) and cached(folder) == []


def test_the_version_of_a_file_is_what_the_server_tells() -> None:
    told = {"name": "x", "size": 5, "ETag": '"a"', "Last-Modified": "now"}
    assert version_of(told) == version_of({**told, "Last-Modified": "later", "name": "y"})
    assert len({version_of({**told, **change}) for change in ({}, {"ETag": "b"}, {"size": 6}, {"ETag": None})}) == 4
    assert version_of({"size": 5}) == ""


def test_shards_that_were_cached_by_name_are_used_if_they_are_the_right_ones(server: Server, tmp_path: Path) -> None:
    folder = RemoteFolder(server.url, tmp_path / "cache")
    zero, one = folder.load_index().shards[:2]
    for shard in (zero, one):
        (folder.folder / shard.name).write_bytes((server.folder / shard.name).read_bytes())
    with (folder.folder / one.name).open("r+b") as file:
        file.seek(2000)
        file.write(b"\1\2\3")
    for shard in (zero, one):
        assert folder.locate(shard).read_bytes() == (server.folder / shard.name).read_bytes()
    assert (server.served[zero.name], server.served[one.name]) == (0, 1)
    assert cached(folder) == [zero.name, one.name] and not (folder.folder / one.name).exists()


def test_a_server_that_sends_more_than_it_promised_fills_no_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    server.faults = {NAMES[0]: ["endless"]}
    folder = RemoteFolder(server.url, tmp_path / "cache")
    with pytest.raises(UserError, match="longer than it should be"):
        folder.locate(folder.load_index().shards[0])
    monkeypatch.setattr(remote, "MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match=r"index.json: cannot be fetched.*longer than it should be"):
        folder.load_index()


def test_a_cache_that_cannot_be_written_to_is_no_missing_index(server: Server, tmp_path: Path) -> None:
    """The PermissionError was taken for the server's: an index without hashes, and no word of it."""
    write(tmp_path / "cache", "a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be cached there .* --data.cache_dir"):
        RemoteFolder(server.url, tmp_path / "cache").load_index()


def test_an_index_that_may_not_be_read_is_not_a_missing_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(f"file://{server.folder}", tmp_path / "cache")
    system, root = folder._connect()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Forbidden")

    monkeypatch.setattr(system, "get_file", refuse)
    monkeypatch.setattr(folder, "_connect", lambda: (system, root))
    with pytest.raises(UserError, match=r"index.json: may not be read \(.*Forbidden"):
        folder.load_index()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_what_was_published_anew_without_an_index(server: Server, tmp_path: Path) -> None:
    """Names and sizes were all that told data sets without hashes apart."""
    (server.folder / "index.json").unlink()

    def module() -> TokenDataModule:
        data = TokenDataModule(
            server.url, tokenizer="byte", batch_size=4, block_size=32, cache_dir=str(tmp_path / "cache")
        )
        data.setup("fit")
        return data

    saved = module().state_dict()
    module().load_state_dict(saved)
    publish(server.folder, 1_000_000_000, index=False)
    with pytest.raises(UserError, match=r"its training tokens are not those .* \(versions "):
        module().load_state_dict(saved)
    del saved["versions"]
    module().load_state_dict(saved)  # of an earlier version
