"""The way to the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from environment import ROOT
from safetensors.torch import load_file

from lit_gpt.checkpoint.format import load_model, save_model
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.write import write_hf
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RunProgram = Callable[..., Any]


class Repository:
    """What the server has under one id.

    Attributes:
        id: `some/model-N`.
        files: name → content.
        digests: name → the SHA-256 that the hub claims, where it is not the content's.
        token: the token that is asked for; None for no question.
        cut: name → how many bytes of the first answer arrive before the connection breaks.
        requests: method, path and range of each request.
    """

    def __init__(self, id: str, files: dict[str, bytes]) -> None:
        self.id, self.files = id, files
        self.digests: dict[str, str] = {}
        self.token: str | None = None
        self.cut: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    def gets(self, name: str = "model.safetensors") -> list[str | None]:
        return [asked for method, path, asked in self.requests if (method, path) == ("GET", name)]


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bool) -> None:
        id, _, file = self.path.lstrip("/").partition("/resolve/")
        name, asked = file.rpartition("/")[2], self.headers.get("Range")
        hub = self.server.repositories.get(id)
        if hub is None:
            return self.refuse(404, "RepoNotFound")
        hub.requests.append((self.command, name, asked))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "RepoNotFound")
        if name not in hub.files:
            return self.refuse(404, "EntryNotFound")
        content = hub.files[name]
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hub.digests.get(name, hashlib.sha256(content).hexdigest())}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        if name in hub.cut:
            self.wfile.write(content[start : hub.cut.pop(name)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(content[start:])


WORKER = """
import contextlib, io, json, os, sys
import huggingface_hub.constants
from lit_gpt.__main__ import main
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # what arrives is kept in such pieces; 10 MB as published
channel, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    asked = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(asked["environment"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(asked["argv"])
    result = {"returncode": status, "stdout": out.getvalue(), "stderr": err.getvalue()}
    print(json.dumps(result), file=channel, flush=True)
"""  # huggingface_hub reads its variables when it is imported: one process for them all, and imports paid once


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Callable[..., Any], dict[str, str]]]:
    """The server, the program in a process that asks it, and the settings of that process."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(ROOT),
    }
    environment = {**os.environ, **settings}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(*argv: object, **environment: str) -> Any:
        assert worker.stdin and worker.stdout
        worker.stdin.write(json.dumps({"argv": list(map(str, argv)), "environment": environment}) + "\n")
        worker.stdin.flush()
        return SimpleNamespace(**json.loads(worker.stdout.readline()))

    yield server, run, settings
    worker.communicate("")
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server: Any, tmp_path: Path, tiny_model: GPT) -> Repository:
    save_model(tmp_path / "tiny.ckpt", tiny_model, get_tokenizer("byte"))
    write_hf(open_source(str(tmp_path / "tiny.ckpt")), tmp_path / "hf")
    repositories = server[0].repositories
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    repository = Repository(f"some/model-{len(repositories)}", files)
    repositories[repository.id] = repository
    return repository


@pytest.fixture
def convert(server: Any, hub: Repository, tmp_path: Path) -> Callable[..., Any]:
    """`lit_gpt convert some/model-N OUTPUT`."""
    return lambda output, **environment: server[1]("convert", hub.id, tmp_path / output, **environment)


def is_tiny(path: Path, model: GPT) -> bool:
    converted, tokenizer = load_model(path)
    return torch.equal(converted.wte.weight, model.wte.weight) and tokenizer is not None


@pytest.mark.slow
def test_whole_then_cached_then_offline(
    hub: Repository, convert: Any, server: Any, program: RunProgram, tmp_path: Path, tiny_model: GPT
) -> None:
    done = convert("a.ckpt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'a.ckpt'}\n"
    assert f"downloading model.safetensors of {hub.id}" in done.stderr
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)
    assert len(hub.gets()) == 1
    assert convert("b.ckpt").returncode == 0
    assert len(hub.gets()) == 1  # from the cache
    before = len(hub.requests)
    offline = program("convert", hub.id, "c.ckpt", **server[2] | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == before
    assert is_tiny(tmp_path / "c.ckpt", tiny_model)


@pytest.mark.slow
def test_interrupted_and_resumed(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    """The connection breaks in the middle of the weights: the rest is asked for, not the whole again."""
    hub.cut["model.safetensors"] = 20_000
    done = convert("a.ckpt")
    if done.returncode:  # then the next call goes on where this one ended
        assert done.returncode == 2 and "start again to resume" in done.stderr
        done = convert("a.ckpt")
    assert done.returncode == 0, done.stderr
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)
    assert any(asked and not asked.startswith("bytes=0-") for asked in hub.gets()), hub.gets()


@pytest.mark.slow
def test_shards_are_fetched_by_the_index(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    content = hub.files.pop("model.safetensors")
    (tmp_path / "whole.safetensors").write_bytes(content)
    names = load_file(tmp_path / "whole.safetensors")
    hub.files["model-00001-of-00001.safetensors"] = content
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert convert("a.ckpt").returncode == 0
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)


def refused(done: Any, *messages: str) -> None:
    assert done.returncode == 2, done.stderr
    last = done.stderr.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("lit_gpt: error: ") and all(message in last for message in messages), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_such_repository(server: Any, tmp_path: Path) -> None:
    done = server[1]("convert", "some/other", tmp_path / "a.ckpt")
    refused(done, "some/other is neither a file here nor a repository of the hub")


def test_a_repository_that_wants_a_token(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    hub.token = "hf_right"
    refused(convert("a.ckpt"), "HF_TOKEN")
    refused(convert("a.ckpt", HF_TOKEN="hf_wrong"), "HF_TOKEN")
    done = convert("a.ckpt", HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)


def test_weights_that_arrive_damaged(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    """As long as they should be, but with other bytes: found by the digest, and not kept."""
    good = hub.files["model.safetensors"]
    hub.digests["model.safetensors"] = hashlib.sha256(good).hexdigest()
    hub.files["model.safetensors"] = good[:-5000] + bytes(byte ^ 1 for byte in good[-5000:])
    refused(convert("a.ckpt"), "model.safetensors arrived damaged")
    assert not (tmp_path / "a.ckpt").exists()
    hub.files["model.safetensors"] = good
    assert convert("a.ckpt").returncode == 0
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)


def test_what_is_not_supported_is_not_downloaded(hub: Repository, convert: Any) -> None:
    hub.files["config.json"] = json.dumps({"model_type": "mamba"}).encode()
    refused(convert("a.ckpt"), "model_type 'mamba'")
    assert hub.gets() == []


@pytest.mark.slow
def test_a_repository_without_safetensors(hub: Repository, convert: Any) -> None:
    del hub.files["model.safetensors"]
    refused(convert("a.ckpt"), "has no model.safetensors")
