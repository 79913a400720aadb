"""A corpus, and what `prepare` makes of it in one go."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fork_server import ForkServer
from preparing import CHINESE, CODE, OPTIONS, cut_small, files

from lit_gpt.data.prepare import prepare


@pytest.fixture(scope="module")
def small_jobs() -> Iterator[None]:
    """Small pieces and jobs in this process and in what it forks, for the modules that prepare the corpus."""
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch.setattr)
        yield


@pytest.fixture
def forked_workers(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes that tokenize are forked: where they are not started anew, their imports are not the point."""
    python = fork_server.write_python(tmp_path_factory.mktemp("bin") / "python")
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 texts, one of more than a small job: about 130 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = (f"{CHINESE if line % 3 else CODE}{number * line}\n" for line in range(900 if number == 9 else 30))
        (folder / f"{number:02d}.txt").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus prepared in one go, in this process."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch.setattr)
        prepare(str(corpus), folder, **OPTIONS)
    assert len(files(folder)) == 9  # three shards a split
    return folder


@pytest.fixture
def server() -> Iterator[Callable[[str, bytes | None], str]]:
    """`server("x.txt", b"…")` gives an address; "short/…" breaks off half-way, None and what is not known is 404."""
    contents: dict[str, bytes | None] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = contents.get(self.path)
            self.send_response(404 if data is None else 200)
            data = data or b""
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if self.path.startswith("/short") else data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()  # how soon it sees its end

        def add(name: str, data: bytes | None) -> str:
            contents[f"/{name}"] = data
            return f"http://127.0.0.1:{running.server_port}/{name}"

        yield add
        running.shutdown()
