"""A server on this machine that answers as the Hugging Face hub does, and the program in a process that asks it.

Downloads (`/resolve/`), and what `huggingface_hub` calls to make a repository and a commit: files in the commit itself,
and large ones by git-lfs first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from environment import ROOT
from fork_server import ForkServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OWNER = "some"
"""To whom the tokens belong."""


class Repository:
    """What the server has under one id.

    Attributes:
        id: `some/model-N`.
        files: name → content.
        digests: name → the SHA-256 that the hub claims, where it is not the content's.
        token: the token that is asked for; None for no question.
        cut: name → how many bytes of the first answer arrive before the connection breaks.
        requests: method, path and range of each request.
        commits: of each commit what it did: key and path of its operations.
        private: whether others may not see it.
    """

    def __init__(self, id: str, files: dict[str, bytes]) -> None:
        self.id, self.files = id, files
        self.digests: dict[str, str] = {}
        self.token: str | None = None
        self.cut: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits: list[list[tuple[str, str]]] = []
        self.private = False

    def gets(self, name: str = "model.safetensors") -> list[str | None]:
        return [asked for method, path, asked in self.requests if (method, path) == ("GET", name)]

    @property
    def commit(self) -> str:
        """The newest one's id."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest() if self.commits else COMMIT


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by id.
        tokens: that may write for `OWNER`; others are not valid.
        readers: that are valid and may not write.
        large: content by SHA-256, as git-lfs has it.
        refusals: end of a path → the status of the next answers there.
        calls: method and path of each request.
        answer: what it says to every question of its API, if it is no hub; else None.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.tokens, self.readers = {"hf_right"}, {"hf_reader"}
        self.large: dict[str, bytes] = {}
        self.refusals: dict[str, int] = {}
        self.calls: list[tuple[str, str]] = []
        self.answer: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer_download(body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            return self.answer_api()
        self.answer_download(body=True)

    def do_POST(self) -> None:
        self.answer_api()

    def do_PUT(self) -> None:
        self.answer_api()

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    # Down ------------------------------------------------------------------------------------------------------------

    def answer_download(self, body: bool) -> None:
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
        self.send_header("X-Repo-Commit", hub.commit)
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

    # Up --------------------------------------------------------------------------------------------------------------

    def answer_api(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        self.server.calls.append((self.command, path))
        if self.server.answer is not None:
            return self.send_bytes(self.server.answer, 200)
        for end, status in self.server.refusals.items():
            if path.endswith(end):
                return self.refuse(status, "")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):  # its address is the permission
            return self.keep_large(path.removeprefix("/lfs/"), body)
        if token not in self.server.tokens | self.server.readers:
            return self.refuse(401, "")
        if path == "/api/whoami-v2":
            return self.send({"type": "user", "name": OWNER, "orgs": []})
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if self.command == "GET":
            return self.describe(path.removeprefix("/api/models/"))
        if token not in self.server.tokens:
            return self.refuse(403, "")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        id, action = path.removeprefix("/api/models/").lstrip("/"), ""
        for end in ("/preupload/main", "/commit/main", ".git/info/lfs/objects/batch"):
            if id.endswith(end):
                id, action = id.removesuffix(end), end
        if id not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        answers = {"/preupload/main": self.preupload, "/commit/main": self.commit}
        answers.get(action, self.batch)(self.server.repositories[id], body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, values: dict[str, Any], status: int = 200) -> None:
        self.send_bytes(json.dumps(values).encode(), status)

    def send_bytes(self, content: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def create(self, asked: dict[str, Any]) -> None:
        id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not id.startswith(f"{OWNER}/"):
            return self.refuse(403, "")
        known = id in self.server.repositories
        if not known:
            repository = self.server.repositories[id] = Repository(id, {})
            repository.private = asked.get("private") is True or asked.get("visibility") == "private"
        self.send({"url": f"{self.server.url}/{id}"}, 409 if known else 200)

    def describe(self, id: str) -> None:
        repository = self.server.repositories.get(id)
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        siblings = [{"rfilename": name} for name in repository.files]
        self.send({"id": id, "private": repository.private, "sha": repository.commit, "siblings": siblings})

    def preupload(self, repository: Repository, body: bytes) -> None:
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self.send({"files": modes})

    def batch(self, repository: Repository, body: bytes) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def keep_large(self, digest: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != digest:
            return self.refuse(400, "")
        self.server.large[digest] = content
        self.send({})

    def commit(self, repository: Repository, body: bytes) -> None:
        made: list[tuple[str, str]] = []
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
            if entry["key"] != "header":
                made.append((entry["key"], value["path"]))
        repository.commits.append(made)
        address = f"{self.server.url}/{repository.id}/commit/{repository.commit}"
        self.send({"success": True, "commitUrl": address, "commitOid": repository.commit})


WORKER = """
import contextlib, io, json, os, socket, sys, tempfile, traceback
import huggingface_hub.constants
from lit_gpt.__main__ import main
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # what arrives is kept in such pieces; 10 MB as published
channel = socket.create_connection(("127.0.0.1", int(sys.argv[1]))).makefile("rw")
for line in channel:
    asked = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(asked["environment"])
    tempfile.tempdir = None  # or the first TMPDIR would be that of all
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(asked["argv"])
        except BaseException:
            status = traceback.print_exc()
    result = {"returncode": status, "stdout": out.getvalue(), "stderr": err.getvalue()}
    print(json.dumps(result), file=channel, flush=True)
"""  # huggingface_hub reads its variables when it is imported: one process for them all, and imports paid once


@contextmanager
def running_hub(cache: Path, fork_server: ForkServer) -> Iterator[tuple[Hub, Callable[..., Any], dict[str, str]]]:
    """The server, the program in a process that asks it, and the settings of that process."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()  # how soon it sees its end
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # a storage of its own, whose protocol the server lacks
        "HF_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    script = cache / "worker.py"
    script.write_text(WORKER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(300)  # for a worker that fails
        worker = fork_server.start(script, listener.getsockname()[1], env={**os.environ, **settings})
        connection = listener.accept()[0]
    with connection, connection.makefile("rw") as channel:

        def run(*argv: object, **environment: str) -> Any:
            asked = {"argv": list(map(str, argv)), "environment": environment}
            print(json.dumps(asked), file=channel, flush=True)
            return SimpleNamespace(**json.loads(channel.readline()))

        yield server, run, settings
    worker.finish()
    server.shutdown()
    server.server_close()


def refused(done: Any, *messages: str) -> None:
    """Check that a run of the program ended with one line that says all of `messages`, and status 2."""
    assert done.returncode == 2, done.stderr
    last = done.stderr.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("lit_gpt: error: ") and all(message in last for message in messages), done.stderr
    assert "Traceback" not in done.stderr
