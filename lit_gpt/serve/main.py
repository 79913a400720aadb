"""`lit_gpt serve`: options, socket, log, start and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import logging
import shlex
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from jsonargparse import Namespace

from lit_gpt.console import note
from lit_gpt.errors import UserError
from lit_gpt.options import make_parser
from lit_gpt.serve.app import create_app
from lit_gpt.serve.connections import ConnectionLimits, limited_protocol
from lit_gpt.serve.middleware import failure_location
from lit_gpt.serve.prometheus import Metrics
from lit_gpt.serve.service import Service, model_name
from lit_gpt.serve.worker import Limits, Worker


def parse(argv: list[str]) -> Namespace:
    """The options of `lit_gpt serve`.

    Raises:
        UserError: for an unknown option or value, or options that do not go together.
    """
    limits = Limits()
    parser = make_parser("serve", "An OpenAI-compatible server and a web page for one checkpoint.")
    add = parser.add_argument
    add("--ckpt_path", type=str | None, help="a checkpoint, or `last` or `best` of the newest run")
    add("--init_from", type=str | None, help="what `lit_gpt convert` reads: a Hugging Face folder or id, …")
    add("--host", type=str, default="127.0.0.1", help="address to listen on; others than loopback need an API key")
    add("--port", type=int, default=8000, help="0 for any free one")
    add("--precision", type=str, default="auto", help="auto, fp32, bf16 or int8")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--max_slots", type=int | None, help="sequences that run at once; by default what half of the memory holds")
    add("--max_queue", type=int, default=limits.max_queue, help="sequences that may wait; beyond it the answer is 429")
    add("--queue_seconds", type=float, default=limits.queue_seconds, help="longest wait for a slot")
    add("--request_seconds", type=float, default=limits.request_seconds, help="longest time for a whole request")
    add("--api_key", type=str | None, help="clients must send Authorization: Bearer KEY (also LIT_GPT_SERVE__API_KEY)")
    add("--api_key_file", type=str | None, help="a file that holds the key, invisible in process lists")
    add("--insecure", type=bool, default=False, help="true: listen beyond loopback without a key")
    add("--allowed_hosts", type=list[str], default=[], help="names under which the server is reached; [*] for any")
    add("--served_model_name", type=str | None, help="what requests call the model; by default the checkpoint's name")
    options: Namespace = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: Namespace) -> None:
    if (options.ckpt_path is None) == (options.init_from is None):
        raise UserError("serve needs a checkpoint: give either --ckpt_path X or --init_from gpt2")
    if not 0 <= options.port <= 65535:
        raise UserError(f"port={options.port} is outside 0 … 65535: choose one inside, 0 for any free one")
    for name, least in (("max_slots", 1), ("max_queue", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value} is too small: choose at least {least}")
    for name in ("queue_seconds", "request_seconds"):
        if not getattr(options, name) > 0:
            raise UserError(f"{name}={getattr(options, name)} must be positive")
    options.api_key = _api_key(options.api_key, options.api_key_file)
    if options.api_key is None and not options.insecure and not _is_loopback(options.host):
        raise UserError(
            f"host={options.host} can be reached by others: give an --api_key (or --api_key_file), "
            "or --insecure true if everybody may use it"
        )


def _api_key(key: str | None, file: str | None) -> str | None:
    if key is not None and file is not None:
        raise UserError("give --api_key or --api_key_file, not both")
    if file is not None:
        try:
            key = Path(file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"api_key_file={file} cannot be read ({error}): name a text file") from error
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError("the API key must be printable ASCII without spaces, and not empty: choose another")
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, bound before the model is loaded, which can take minutes.

    Raises:
        UserError: if the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port") from None
    return listener


def main(argv: list[str]) -> int:
    """Run `lit_gpt serve` until SIGTERM or Ctrl-C.

    Raises:
        UserError: for bad options or a checkpoint that cannot be loaded.
    """
    options = parse(argv)
    listener = bind(options.host, options.port)
    set_up_logging()
    source = options.ckpt_path or options.init_from
    service = build_service(options, source)
    app = create_app(service, options.api_key, (*options.allowed_hosts, options.host))
    drain = service.worker.limits.drain_seconds
    config = server_config(app, service, timeout_graceful_shutdown=int(drain) + 5)
    server = Server(config, service.worker)
    _announce(service, listener, options.api_key is not None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises what it caught once more when it has finished
    gc.freeze()  # half a million objects of modules: a collection of all holds the streams up for 0.3 s
    server.run(sockets=[listener])
    return 1 if service.worker.failed else 0


def server_config(
    app: FastAPI, service: Service, limits: ConnectionLimits | None = None, **options: Any
) -> uvicorn.Config:
    """uvicorn's settings: HTTP only, with limits of connections, and no log but ours."""
    return uvicorn.Config(
        app,
        http=limited_protocol(limits or ConnectionLimits(), service.metrics),
        ws="none",  # a connection that becomes a web socket would have no limits
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than clients keep idle connections, or both hang up at the same moment
        lifespan="on",
        **options,
    )


def build_service(options: Namespace, source: str) -> Service:
    """Load the model, build its engine and the worker that runs it.

    Raises:
        UserError: if it cannot be loaded, or has no tokenizer.
    """
    from lit_gpt.api import load

    note(f"loading {source}")
    gpt = load(source, precision=options.precision, device=options.device)
    if gpt.tokenizer is None:
        raise UserError(f"{source} was trained on bare ids and has no tokenizer: serve needs one to speak text")
    metrics = Metrics()
    limits = Limits(options.max_queue, options.queue_seconds, options.request_seconds)
    worker = Worker(gpt.engine(max_slots=options.max_slots), metrics, limits)
    return Service(options.served_model_name or model_name(source), gpt.config, gpt.tokenizer, worker, metrics)


def _announce(service: Service, listener: socket.socket, has_key: bool) -> None:
    host, port = listener.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    body = json.dumps({"model": service.name, "prompt": "Once upon a time", "max_tokens": 30})
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    note(
        f"serving {service.name}: context {service.config.block_size}, {service.worker.engine.slots.n_slot} slots, "
        f"{service.worker.limits.max_queue} more may wait"
    )
    note(f"page:  http://{host}:{port}/")
    headers = f"-H 'Content-Type: application/json'{key}"
    note(f"try:   curl http://{host}:{port}/v1/completions {headers} -d {shlex.quote(body)}")


class SingleLineFormatter(logging.Formatter):
    """One line for each record, whatever it contains; of an exception only its type and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message."""
        text = f"{self.formatTime(record)} {record.levelname.lower()} {record.getMessage()}"
        if record.exc_info and record.exc_info[1]:
            text += f" ({failure_location(record.exc_info[1])})"
        return ascii(text)[1:-1] if not text.isprintable() else text


_LOGGERS = (
    ("lit_gpt.serve", logging.INFO),
    ("lit_gpt.generation", logging.WARNING),
    ("uvicorn.error", logging.WARNING),
)


def set_up_logging() -> None:
    """Our log and uvicorn's warnings to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SingleLineFormatter())
    for name, level in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class Server(uvicorn.Server):
    """uvicorn that lets running requests finish before it stops.

    At the signal the listening socket closes and new requests on open connections get 503; what runs has
    `drain_seconds`, after which it fails with 503 too.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT; a second SIGINT stops at once."""
        if not self.worker.draining:
            note(
                f"stopping: {self.worker.reserved} running or waiting, at most {self.worker.limits.drain_seconds:.0f} s"
            )
            self.worker.draining = True
            with contextlib.suppress(RuntimeError):
                loop = asyncio.get_running_loop()
                loop.call_later(self.worker.limits.drain_seconds, self.worker.stop)
        super().handle_exit(sig, frame)
