"""A `lit_gpt serve` of its own, abused in every way; between all of it good requests, whose texts are known."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx
from bench_serve import wait_for_server
from request_fuzz import ROWS, TEMPLATE, requests

from torture_sections.children import Child, Work, program, resident_memory, value_of
from torture_sections.section import Section, Wrong, check, drawn

JSON = {"Content-Type": "application/json"}
GOOD: list[dict[str, Any]] = [
    {"prompt": "To be", "max_tokens": 9, "temperature": 0},
    {"prompt": "or not", "max_tokens": 9, "seed": 3, "repetition_penalty": 1.2, "top_k": 40, "ignore_eos": True},
    {"prompt": [65, 256, 258], "max_tokens": 5, "temperature": 0, "echo": True},
    {"prompt": "that is", "max_tokens": 20, "seed": 4, "temperature": 0.7},
]
KINDS = ("fuzz", "fuzz", "leave", "slow", "idle", "large", "bytes")
WAIT = 60.0
"""Seconds after which a good request has failed."""
GROWTH_MB, GROWTH_FILES = 150, 3
"""That the server may have more at the end than after the first trials."""


def make_checkpoint(path: Path) -> None:
    """A random model with more rows than its tokenizer has ids, and a chat template that can fail."""
    from models import chat_tokenizer, tiny_gpt

    from lit_gpt.checkpoint.format import save_model

    save_model(path, tiny_gpt(std=None, vocab_size=ROWS, block_size=96, init_std=0.3).float(), chat_tokenizer(TEMPLATE))


class ServerSection(Section):
    """A trial is one kind of abuse, with a good request at the same time and one after it."""

    name = "serve"
    share = 25
    short_trials = 9
    process: Child | None = None
    before: tuple[int, int] | None = None
    slowest = 0.0

    def set_up(self) -> None:
        """Start it, and learn the texts of the good requests from the Python API and from the idle server."""
        path, self.log = self.folder / "tiny.ckpt", self.folder / "log"
        value_of(lambda: make_checkpoint(path))
        self.log.touch()
        self.process = Child(self.folder, self._serving(path))
        try:
            self.url = wait_for_server(self.process, self.log)
        except SystemExit as error:
            raise Wrong(str(error)) from error
        host, port = self.url.removeprefix("http://").split(":")
        self.address = host, int(port)
        limits = httpx.Limits(max_keepalive_connections=0)  # a kept one could be closed in favour of the abusers
        self.http = httpx.Client(base_url=self.url, timeout=WAIT, limits=limits)
        self.texts = [self._complete(body) for body in GOOD]

        def generate() -> str:
            from lit_gpt.api import load

            return load(str(path), "fp32", "cpu").generate("To be", max_new_tokens=9, temperature=0.0)

        known = value_of(generate)
        check(self.texts[0] == known, f"the server says {self.texts[0]!r}, the Python API {known!r}")
        self.variants: list[tuple[str, bytes]] = []

    def _serving(self, path: Path) -> Work:
        flags = ("--device", "cpu", "--precision", "fp32", "--max_slots", "4", "--max_queue", "64")

        def work() -> int | None:
            with open(self.log, "wb") as log:
                os.dup2(log.fileno(), 2)
            return program("serve", "--ckpt_path", path, "--port", "0", *flags)()

        return work

    def _complete(self, body: dict[str, Any]) -> str:
        answer = self.http.post("/v1/completions", json=body)
        check(answer.status_code == 200, f"a good request got {answer.status_code}: {answer.text[:200]}")
        return answer.json()["choices"][0]["text"]

    def _check_good(self, index: int) -> None:
        """A good request gets its text. Raises Wrong."""
        began = time.monotonic()
        try:
            while (text := self._try_good(index)) is None:  # 429: the queue is full, as it may be; it asks to come back
                check(time.monotonic() - began < WAIT, "a good request was turned away for a minute")
                time.sleep(0.1)
        except httpx.HTTPError as error:
            raise Wrong(f"a good request failed: {type(error).__name__}: {error}") from error
        self.slowest = max(self.slowest, time.monotonic() - began)
        check(text == self.texts[index], f"{GOOD[index]} got {text!r}, not {self.texts[index]!r}")

    def _try_good(self, index: int) -> str | None:
        answer = self.http.post("/v1/completions", json=GOOD[index])
        busy = answer.status_code == 429 or (answer.status_code == 503 and "too_many_connections" in answer.text)
        if busy:
            return None
        check(answer.status_code == 200, f"a good request got {answer.status_code}: {answer.text[:200]}")
        return answer.json()["choices"][0]["text"]

    def trial(self, random: Random) -> None:
        """Abuse of one kind."""
        kind = KINDS[self.number % len(KINDS)]
        with ExitStack() as stack:
            with ThreadPoolExecutor(1) as pool:
                good = pool.submit(self._check_good, random.randrange(len(GOOD)))
                getattr(self, f"_{kind}")(random, stack)
            with self.trying("good requests during abuse: the known text"):
                good.result()
            with self.trying("good requests after abuse: the known text"):
                self._check_good(random.randrange(len(GOOD)))
        with self.trying("/health is 200 after each trial"):
            check(self.http.get("/health").status_code == 200, "the server is not well")
        if self.number == (1 if self.short else 4) * len(KINDS):  # by now every path has been used
            self._wait_for_closing()
            self.before = self._held()

    # Kinds of abuse -----------------------------------------------------------------------------------------------

    def _fuzz(self, random: Random, stack: ExitStack) -> None:
        if len(self.variants) < 8:
            self.variants = drawn(requests(), 60, random.randrange(2**31))[5:]  # the first are the simplest
        count = random.randint(3, 8)
        sent = [_well_formed(random) if random.random() < 0.5 else self.variants.pop() for _ in range(count)]
        with self.trying("random requests: answered, or refused in words", len(sent)) as tally:
            with ThreadPoolExecutor(len(sent)) as pool:
                answers = list(pool.map(self._post, sent))
            for (path, body), answer in zip(sent, answers):
                tally.how = f"{path} {body[:300]!r}"
                tally.details[str(answer.status_code)] += 1
                self._check_answer(answer)

    def _post(self, request: tuple[str, bytes]) -> httpx.Response:
        path, body = request
        return self.http.post(path, content=body, headers=JSON)

    def _check_answer(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        error = answer.json()["error"]
        allowed = 400 <= answer.status_code < 500 or error["code"] in ("generation_failed", "too_many_connections")
        check(allowed and "the log says where" not in answer.text, f"{answer.status_code}: {answer.text[:200]}")

    def _leave(self, random: Random, stack: ExitStack) -> None:
        count = random.randint(10, 40)
        with self.trying("clients that leave in the middle of their answers", count):
            for _ in range(count):
                body = {"prompt": "x" * random.randint(0, 60), "max_tokens": 60, "stream": random.random() < 0.7}
                connection = self._connect(stack, _message("/v1/completions", json.dumps(body | {"n": 1}).encode()))
                if random.random() < 0.5:
                    connection.settimeout(0.05 * random.random() + 0.001)
                    with suppress(OSError):
                        connection.recv(200)
                if random.random() < 0.5:  # with a reset, as when the client is killed
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

    def _slow(self, random: Random, stack: ExitStack) -> None:
        count = random.randint(3, 12)
        with self.trying("clients that send or read a byte at a time", count):
            body = json.dumps({"prompt": "To be", "max_tokens": 9, "temperature": 0, "stream": True}).encode()
            message = _message("/v1/completions", body)
            ends = [random.choice([0, random.randrange(len(message)), len(message)]) for _ in range(count)]
            sockets = [self._connect(stack, message[:end]) for end in ends]
            for step in range(20):
                for end, connection in zip(ends, sockets):
                    connection.settimeout(0.02)
                    with suppress(OSError):
                        connection.send(message[end + step : end + step + 1])
                        connection.recv(1)

    def _idle(self, random: Random, stack: ExitStack) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100
        count = min(most, random.choice([30, 150] if self.short else [30, 150, 400, 1100]))
        with self.trying("connections that say nothing, or half a header", count):
            head = _message("/v1/completions", b"{}" * 20)
            for _ in range(count):
                self._connect(stack, head[: random.choice([0, 10, 60, len(head) - 5])])
            self._check_good(0)

    def _large(self, random: Random, stack: ExitStack) -> None:
        n = random.choice([1000, 60_000, 400_000])
        bodies: list[bytes] = [
            json.dumps({"prompt": ["a", 1, None] * (n // 3)}).encode(),
            json.dumps({"prompt": list(range(-n, 0))}).encode(),
            json.dumps({"prompt": ["a"] * n, "max_tokens": 1}).encode(),
            json.dumps({"prompt": " " * (2 * n), "max_tokens": 1}).encode(),
            json.dumps({"prompt": "\U0001f469\u200d\u2764\ufe0f\u202e\u0000" * (n // 10)}).encode(),
            b'{"prompt": ' + b"[" * n + b"]" * n + b"}",
            b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(n // 10)) + b"}}",
            b'{"prompt": "a", "max_tokens": ' + b"9" * n + b"}",
            b'{"prompt": "' + b"\\ud800" * (n // 6) + b'"}',
            b"\x00" * (2 * n),
        ]
        body, path = random.choice(bodies), random.choice(["/v1/completions", "/tokenize", "/v1/chat/completions"])
        with self.trying("huge and deep bodies: refused in words, others answered meanwhile") as tally:
            tally.how = f"{path} {len(body)} bytes of {body[:60]!r}"
            answer = self._post((path, body))
            tally.details[str(answer.status_code)] += 1
            self._check_answer(answer)

    def _bytes(self, random: Random, stack: ExitStack) -> None:
        count = random.randint(5, 20)
        with self.trying("connections with random bytes in place of HTTP", count):
            good = _message("/v1/completions", b'{"prompt": "a"}')
            for _ in range(count):
                data = bytearray(random.choice([good, random.randbytes(300), good[:40] + random.randbytes(200)]))
                for _ in range(random.randint(1, 5)):
                    data[random.randrange(len(data))] = random.randrange(256)
                connection = self._connect(stack, bytes(data))
                connection.settimeout(0.05)
                with suppress(OSError):
                    connection.recv(1000)

    def _connect(self, stack: ExitStack, data: bytes) -> socket.socket:
        """A connection on which `data` has been sent; the server may have closed it for another one."""
        connection = stack.enter_context(socket.create_connection(self.address, timeout=10))
        with suppress(ConnectionError):
            connection.sendall(data)
        return connection

    # The end ------------------------------------------------------------------------------------------------------

    def _held(self) -> tuple[int, int]:
        """Resident memory in MB, and open files, of the server."""
        assert self.process is not None
        pid = self.process.pid
        return resident_memory(pid) // 1024, len(os.listdir(f"/proc/{pid}/fd"))

    def _wait_for_closing(self) -> None:
        """Wait until connections that were left are closed."""
        deadline, fewest = time.monotonic() + 15, self.before[1] if self.before else self._held()[1]
        while time.monotonic() < deadline and self._held()[1] > fewest + GROWTH_FILES:
            time.sleep(0.5)

    def finish(self) -> None:
        """What it holds at the end, what it has logged, and whether it ends well."""
        if self.process is None:
            return
        try:
            if self.process.poll() is None:
                self._check_held()
        finally:
            with self.trying("the server ends well on SIGTERM, and its log has no failure of its own"):
                self.process.send(signal.SIGTERM)
                ended = self.process.wait(60)
                log = self.log.read_text("utf-8", "replace")
                check(ended is not None and ended.status == 0, f"it ended with {ended}: {log[-300:]}")
                check("Traceback" not in log and "panicked" not in log, "a traceback in the log")

    def _check_held(self) -> None:
        with self.trying("memory and open files at the end") as tally:
            self._wait_for_closing()
            after = self._held()
            before = self.before or after
            tally.remark = f"{before[0]} to {after[0]} MB, {before[1]} to {after[1]} files; "
            tally.remark += f"slowest good answer {self.slowest:.1f} s"
            check(after[0] <= before[0] + GROWTH_MB, f"{after[0]} MB, {before[0]} after the first trials")
            check(after[1] <= before[1] + GROWTH_FILES, f"{after[1]} open files, {before[1]} after the first trials")


def _well_formed(random: Random) -> tuple[str, bytes]:
    """A request that could be right: of any settings, among them ids that the model has and its tokenizer has not."""
    ids = [random.randrange(ROWS if random.random() < 0.3 else 259) for _ in range(random.randint(1, 40))]
    text = "".join(random.choice("to be or not 春眠🙂\u202e\n<|im_end|>") for _ in range(random.randint(1, 60)))
    settings: dict[str, Any] = {
        "temperature": random.choice([0, 1e-6, 0.7, 2]),
        "top_k": random.randint(1, ROWS),
        "top_p": random.choice([1e-9, 0.5, 1]),
        "repetition_penalty": random.choice([0.5, 1, 1.3]),
        "frequency_penalty": random.uniform(-2, 2),
        "seed": random.randrange(2**31),
        "ignore_eos": random.random() < 0.5,
        "logit_bias": {str(random.randrange(259)): random.choice([-100, -1, 5, 100])},
        "stop": random.choice(["e", ["\n\n", "the"], "🙂"]),
        "stream": random.random() < 0.3,
        "n": random.randint(1, 3),
    }
    body: dict[str, Any] = {name: settings[name] for name in random.sample(sorted(settings), random.randint(0, 5))}
    path = random.choice(["/v1/completions", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
    if path == "/v1/completions":
        extra = random.choice([{}, {"echo": True, "logprobs": 3}, {"logprobs": 5}, {"best_of": 2}])
        body |= {"prompt": random.choice([text, ids, [text, "a"], [ids, [65]]]), "max_tokens": random.randint(0, 40)}
        body |= extra
    elif path == "/v1/chat/completions":
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": random.randint(1, 20)}
    else:
        body = {"prompt": text} if path == "/tokenize" else {"tokens": ids}
    return path, json.dumps(body).encode()


def _message(path: str, body: bytes) -> bytes:
    """An HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body
