"""`lit_gpt serve` as a process: options, start, graceful shutdown."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from environment import ROOT
from fork_server import Child, ForkServer
from serving import make_model, wait_for

from lit_gpt.checkpoint.format import save_model
from lit_gpt.errors import UserError
from lit_gpt.serve import main as serve_main
from lit_gpt.tokenizer.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "small one.ckpt"
    save_model(path, make_model(block_size=1024).float(), get_tokenizer("byte"))
    return path


@contextmanager
def running(server: ForkServer, *arguments: object, **environment: str) -> Iterator[tuple[Child, str, list[str]]]:
    """The process, its address, and its lines on stderr until it was ready."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = server.start("-m", "lit_gpt", "serve", "--port", "0", *arguments, env=env)

    def lines() -> list[str]:
        return process.output()[1].splitlines(keepends=True)

    def is_ready() -> bool:
        assert process.poll() is None, lines()
        return bool(re.search(r"^try:.*\n", process.output()[1], re.MULTILINE))

    try:
        wait_for(is_ready)
        address = re.search(r"page: +(http://\S+)/\n", lines()[-2])
        assert address is not None
        wait_for(lambda: _answers(address[1]))
        yield process, address[1], lines()
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_the_curl_line_has_a_text_of_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    service = mock.Mock(sample_prompts=("它's\nso", "other"), adapters=())
    service.name = "small"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve_main._announce(service, listener, has_key=False)
    *_, body = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert json.loads(body) == {"model": "small", "prompt": "它's\nso", "max_tokens": 30}


@pytest.mark.slow
def test_from_start_to_sigterm(checkpoint: Path, fork_server: ForkServer) -> None:
    """It prints a curl line that works; at SIGTERM it finishes what runs, accepts nothing new, and exits with 0."""
    options = ("--ckpt_path", checkpoint, "--max_slots", 3)
    with running(fork_server, *options, LIT_GPT_SERVE__API_KEY="sesame") as (process, url, lines):
        assert "small-one" in lines[1] and "3 slots" in lines[1]
        assert "curl" in lines[3] and "Authorization: Bearer KEY" in lines[3]
        curl = lines[3].removeprefix("try:").replace("KEY", "sesame")
        assert '"text_completion"' in subprocess.run(curl, shell=True, capture_output=True, text=True).stdout
        headers = {"Authorization": "Bearer sesame"}
        body = {"prompt": "a", "max_tokens": 700, "ignore_eos": True}

        def ask() -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)

        def is_running() -> bool:
            text = httpx.get(f"{url}/metrics", headers=headers).text
            return "lit_gpt:requests_running 1.0" in text

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask)
            wait_for(is_running)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not _answers(url))
            assert process.poll() is None or answer.done()
            assert answer.result().json()["usage"]["completion_tokens"] == 700
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in process.output()[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--ckpt_path"),
        (["--ckpt_path", "x", "--init_from", "y"], "either"),
        (["--ckpt_path", "x", "--port", "70000"], "port=70000"),
        (["--ckpt_path", "x", "--host", "0.0.0.0"], "api_key"),
        (["--ckpt_path", "x", "--host", "gpt.example"], "api_key"),
        (["--ckpt_path", "x", "--max_slots", "0"], "max_slots=0"),
        (["--ckpt_path", "x", "--max_queue", "-1"], "max_queue=-1"),
        (["--ckpt_path", "x", "--request_seconds", "0"], "request_seconds"),
        (["--ckpt_path", "x", "--api_key", ""], "API key"),
        (["--ckpt_path", "x", "--api_key", "a", "--api_key_file", "b"], "not both"),
        (["--ckpt_path", "x", "--api_key_file", "/nowhere"], "/nowhere"),
        (["--ckpt_path", "x", "--max_slot", "3"], "max_slots"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        serve_main.parse(arguments)


def test_valid_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    options = serve_main.parse(["--ckpt_path", "x", "--host", "0.0.0.0", "--api_key_file", str(key)])
    assert options.api_key == "sesame"
    assert serve_main.parse(["--init_from", "gpt2", "--host", "::", "--insecure", "true"]).api_key is None
    assert serve_main.parse(["--init_from", "gpt2", "--host", "::1"]).port == 8000
    monkeypatch.setenv("LIT_GPT_SERVE__API_KEY", "from-outside")
    assert serve_main.parse(["--ckpt_path", "x"]).api_key == "from-outside"


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="--port"):
            serve_main.bind("127.0.0.1", other.getsockname()[1])


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "bare.ckpt", make_model().float(), None)
    options: Any = serve_main.parse(["--ckpt_path", str(tmp_path / "bare.ckpt"), "--precision", "fp32"])
    with pytest.raises(UserError, match="no tokenizer"):
        serve_main.build_service(options, options.ckpt_path)
