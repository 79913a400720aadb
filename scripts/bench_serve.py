"""Benchmarks of the server: throughput of many streams, time to first token, and a soak with disconnecting clients.

    python scripts/bench_serve.py throughput --precision fp32     16 streams at once against the same one by one
    python scripts/bench_serve.py prefix                          time to first token, with and without a shared prefix
    python scripts/bench_serve.py soak --requests 10000           disconnecting and slow clients, bad JSON, large bodies
    python scripts/bench_serve.py throughput --url http://127.0.0.1:8080     the same load on another server

A server is started on loopback with random weights of the given preset, unless `--url` names one. Every figure goes to
stdout as one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx

ROOT = Path(__file__).resolve().parent.parent


# --- the server under test


def make_checkpoint(folder: Path, preset: str, tokenizer: str) -> Path:
    """A checkpoint of random weights: the computation does not depend on their values."""
    import torch

    from lit_gpt.checkpoint.format import save_model
    from lit_gpt.model.config import GPTConfig
    from lit_gpt.model.gpt import GPT
    from lit_gpt.tokenizer.tokenizer import get_tokenizer

    torch.manual_seed(0)
    encoding = get_tokenizer(tokenizer)
    small = GPTConfig(vocab_size=encoding.n_vocab, block_size=256, n_layer=2, n_head=4, n_embd=64, init_std=0.2)
    config = small if preset == "tiny" else GPTConfig.from_preset(preset)
    path = folder / f"{preset}.ckpt"
    save_model(path, GPT(config), encoding)
    return path


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Address and process id of a running server; of the one that `--url` names, only the address."""
    if arguments.url:
        yield arguments.url, None
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder), arguments.preset, arguments.tokenizer)
        command = [sys.executable, "-m", "lit_gpt", "serve", "--ckpt_path", str(checkpoint), "--port", "0"]
        command += ["--precision", arguments.precision, "--max_slots", str(arguments.slots)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
        log = open(Path(folder) / "log", "w+")  # noqa: SIM115
        process = subprocess.Popen(command, stderr=log, env=environment)
        try:
            yield wait_for_server(process, Path(log.name)), process.pid
        finally:
            process.terminate()
            process.wait(timeout=60)


class Process(Protocol):
    """One that may have ended."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""


def wait_for_server(process: Process, log: Path) -> str:
    """The server's address, once `/health` answers."""
    while True:
        address = re.search(r"page: +(http://\S+)/", log.read_text())
        if address is not None:
            try:
                if httpx.get(f"{address[1]}/health").status_code == 200:
                    return address[1]
            except httpx.TransportError:
                pass
        if process.poll() is not None:
            raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")
        time.sleep(0.1)


# --- clients


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds to the first token, and the number of tokens, of one streamed completion."""
    began, first, tokens, pieces = time.perf_counter(), 0.0, 0, 0
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"] and not first:
                first = time.perf_counter() - began
            tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
            pieces += any(choice["text"] for choice in chunk["choices"])
    return first, tokens or pieces  # not every server sends usage in streams


def make_client(url: str) -> httpx.AsyncClient:
    """A client with a long timeout and no limit of connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits)


async def throughput(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of the same requests at once and one by one, in turn, the median of some rounds."""
    extras = {} if arguments.url else {"ignore_eos": True}
    bodies = [
        {
            "model": arguments.model,
            "prompt": f"{i} Once upon a time there was",
            "seed": i,
            "temperature": 0.8,
            "top_k": 50,
        }
        | {"max_tokens": arguments.tokens, **extras}
        for i in range(arguments.streams)
    ]
    together, alone = [], []
    async with make_client(url) as client:
        await stream(client, bodies[0])  # warm
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            counts = await asyncio.gather(*(stream(client, body) for body in bodies))
            together.append(sum(n for _, n in counts) / (time.perf_counter() - began))
            began, total = time.perf_counter(), 0
            for body in bodies[: arguments.alone]:
                total += (await stream(client, body))[1]
            alone.append(total / (time.perf_counter() - began))
    ratios = [many / one for many, one in zip(together, alone)]
    return {
        "streams": arguments.streams,
        "tokens_per_s_together": round(statistics.median(together), 1),
        "tokens_per_s_one_by_one": round(statistics.median(alone), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }


async def prefix(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time to first token of prompts of 512 + 16 tokens: all new, and with the first 512 seen before."""
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(1000, 40000) for _ in range(n)]

    shared, cold, warm = ids(512), [], []
    async with make_client(url) as client:
        await stream(client, {"prompt": shared + ids(16), "max_tokens": 4})
        for _ in range(arguments.rounds):
            cold.append((await stream(client, {"prompt": ids(528), "max_tokens": 4}))[0])
            warm.append((await stream(client, {"prompt": shared + ids(16), "max_tokens": 4}))[0])
    ratio = statistics.median(warm) / statistics.median(cold)
    return {
        "ttft_cold_s": round(statistics.median(cold), 4),
        "ttft_shared_prefix_s": round(statistics.median(warm), 4),
        "ratio": round(ratio, 3),
    }


# --- the soak


async def soak(url: str, arguments: argparse.Namespace, pid: int | None) -> dict[str, Any]:
    """Many requests, a fifth of whose clients disconnect; slots and memory left in use, and wrong answers."""
    bodies = [{"prompt": f"prompt {i}", "max_tokens": 12, "seed": i, "ignore_eos": True} for i in range(16)]
    counts: dict[str, int] = {}
    async with make_client(url) as client:
        right = [(await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] for body in bodies]
        await send_requests(client, url, 500, arguments.clients, bodies, right, {})  # fills pools and caches
        before = process_state(pid)
        began = time.perf_counter()
        await send_requests(client, url, arguments.requests, arguments.clients, bodies, right, counts)
        seconds = time.perf_counter() - began
        await asyncio.sleep(1)
        metrics = (await client.get("/metrics")).text
    running = re.findall(r"^lit_gpt:requests_(running|waiting) (\S+)$", metrics, re.M)
    disconnects = re.search(r"^lit_gpt:client_disconnects_total (\S+)$", metrics, re.M)
    return {
        "requests": arguments.requests,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(counts.items())),
        "left": {name: float(value) for name, value in running},
        "disconnects": float(disconnects[1]) if disconnects else None,
        "before": before,
        "after": process_state(pid),
    }


async def send_requests(
    client: httpx.AsyncClient,
    url: str,
    requests: int,
    clients: int,
    bodies: list[dict[str, Any]],
    right: list[str],
    counts: dict[str, int],
) -> None:
    """`requests` requests by `clients` clients at once."""
    draw = random.Random(requests)
    todo = iter(range(requests))

    async def one_client() -> None:
        for i in todo:
            body, text = bodies[i % len(bodies)], right[i % len(bodies)]
            try:
                outcome = await one_request(client, url, draw.random(), body, text)
            except httpx.TransportError as error:
                outcome = f"broken {type(error).__name__}"
            counts[outcome] = counts.get(outcome, 0) + 1

    await asyncio.gather(*(one_client() for _ in range(clients)))


async def one_request(client: httpx.AsyncClient, url: str, chance: float, body: dict[str, Any], text: str) -> str:
    """The outcome of one request; `chance` decides its kind."""
    if chance < 0.20:
        return await disconnect(url, {**body, "max_tokens": 200, "stream": chance < 0.10}, chance)
    if chance < 0.25:
        answer = await client.post("/v1/completions", content=b'{"prompt": ')
        return f"bad JSON {answer.status_code}"
    if chance < 0.26:
        answer = await client.post("/v1/completions", content=b" " * (5 << 20))
        return f"oversize {answer.status_code}"
    if chance < 0.28:
        return await read_slowly(client, body, text)
    if chance < 0.5:
        pieces = []
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return f"refused {answer.status_code}"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
        return "stream right" if "".join(pieces) == text else "stream WRONG"
    answer = await client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        return f"refused {answer.status_code}"
    return "right" if answer.json()["choices"][0]["text"] == text else "WRONG"


async def disconnect(url: str, body: dict[str, Any], chance: float) -> str:
    """Send a request, wait `chance` / 2 seconds, and abort the connection."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode())
    writer.write(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    await asyncio.sleep(chance / 2)
    writer.transport.abort()
    return "left"


async def read_slowly(client: httpx.AsyncClient, body: dict[str, Any], text: str) -> str:
    """Read the stream 256 bytes at a time, with pauses."""
    got = b""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return f"refused {answer.status_code}"
        async for part in answer.aiter_raw(256):
            got += part
            await asyncio.sleep(0.02)
    events = [json.loads(line[6:]) for line in got.decode().split("\n") if line.startswith("data: {")]
    return "slow right" if "".join(event["choices"][0]["text"] for event in events) == text else "slow WRONG"


def process_state(pid: int | None) -> dict[str, int]:
    """Memory in MB, open descriptors and threads of the server's process."""
    if pid is None:
        return {}
    status = Path(f"/proc/{pid}/status").read_text()
    memory = re.search(r"VmRSS:\s+(\d+) kB", status)
    threads = re.search(r"Threads:\s+(\d+)", status)
    return {
        "rss_mb": int(memory[1]) // 1024 if memory else 0,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(threads[1]) if threads else 0,
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "prefix", "soak"])
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--model", help="the model's name there")
    parser.add_argument("--preset", help="whose random weights to serve; gpt2, or tiny for the soak")
    parser.add_argument("--tokenizer", help="gpt2, or byte for the soak")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--alone", type=int, default=4, help="how many of them to send one by one as well")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    tiny = arguments.what == "soak"
    arguments.preset = arguments.preset or ("tiny" if tiny else "gpt2")
    arguments.tokenizer = arguments.tokenizer or ("byte" if tiny else "gpt2")
    with server(arguments) as (url, pid):
        if arguments.what == "soak":
            result = asyncio.run(soak(url, arguments, pid))
        else:
            result = asyncio.run((throughput if arguments.what == "throughput" else prefix)(url, arguments))
    print(json.dumps({"bench": arguments.what, "precision": arguments.precision, **result}))


if __name__ == "__main__":
    main()
