"""A real server on loopback that serves tiny models with random weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import torch
import uvicorn
from models import tiny_gpt

from lit_gpt.data.token_stream import TokenStream
from lit_gpt.generation.engine import Engine
from lit_gpt.model.gpt import GPT
from lit_gpt.serve.app import create_app
from lit_gpt.serve.connections import ConnectionLimits
from lit_gpt.serve.main import server_config
from lit_gpt.serve.prometheus import Metrics
from lit_gpt.serve.service import Service
from lit_gpt.serve.worker import Limits, Worker
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

CONTEXT = 96
CHROMIUM = "/usr/bin/chromium"


@dataclass
class Serving:
    """A running server: its address, service and model."""

    url: str
    service: Service
    model: GPT
    http: httpx.Client
    uvicorn: uvicorn.Server

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    def client(self, **options: Any) -> openai.OpenAI:
        defaults = {"api_key": "none", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**defaults, **options})

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"lit_gpt:{name}"))

    def wait_until_idle(self) -> None:
        """Until no slot and no queue capacity is in use; a test that never gets there fails."""
        wait_for(lambda: not self.service.worker.engine.n_running and not self.service.worker.reserved)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def make_model(seed: int = 0, block_size: int = CONTEXT, vocab_size: int = 257) -> GPT:
    return tiny_gpt(seed, std=None, vocab_size=vocab_size, block_size=block_size, init_std=0.3)


class Slow(torch.nn.Module):
    """A model each of whose forward passes takes `seconds`, or fails when told to."""

    def __init__(self, model: GPT, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds, self.broken = model, seconds, False

    def forward(self, *args: Any, **options: Any) -> Any:
        if self.broken:
            raise RuntimeError("the prompt was: secret")
        time.sleep(self.seconds)
        return self.model(*args, **options)


@contextmanager
def serving(
    model: GPT | None = None,
    tokenizer: Tokenizer | None = None,
    seconds: float = 0.0,
    max_slots: int = 4,
    limits: Limits | None = None,
    connections: ConnectionLimits | None = None,
    training_text: TokenStream | None = None,
    sample_prompts: tuple[str, ...] = (),
    **options: Any,
) -> Iterator[Serving]:
    model = model or make_model()
    tokenizer = tokenizer or get_tokenizer("byte")
    metrics = Metrics()
    engine = Engine(Slow(model, seconds), model.config, tokenizer, max_slots=max_slots, dtype=torch.float64)
    worker = Worker(engine, metrics, limits or Limits(max_queue=32))
    of_model: dict[str, Any] = {"training_text": training_text, "sample_prompts": sample_prompts}
    service = Service("tiny", model.config, tokenizer, worker, metrics, **of_model)
    config = server_config(create_app(service, **options), service, connections, port=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60, verify=False) as http:
            yield Serving(url, service, model, http, server)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
