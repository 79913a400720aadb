"""`lit_gpt serve`: socket, log, start and graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import shlex
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from jsonargparse import Namespace

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError
from lit_gpt.serve.app import create_app
from lit_gpt.serve.connections import ConnectionLimits, limited_protocol
from lit_gpt.serve.middleware import failure_location
from lit_gpt.serve.options import Limits, parse
from lit_gpt.serve.prometheus import Metrics
from lit_gpt.serve.service import Service, model_name
from lit_gpt.serve.training_text import open_training_text
from lit_gpt.serve.worker import Worker


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
    from lit_gpt.api import load_for
    from lit_gpt.convert.adapter_set import parse_adapters
    from lit_gpt.convert.recognise import frozen_manifest

    name, adapters = options.served_model_name or model_name(source), parse_adapters(options.adapter)
    if name in adapters:
        raise UserError(f'the model and an adapter are both "{name}": rename one, or give --served_model_name')
    frozen = frozen_manifest(source)
    note(f"loading {source}" + (f", frozen {frozen.frozen_at}, manifest {frozen.sha256}" if frozen else ""))
    gpt = load_for(source, options.precision, options.device, options.n_head, "lit_gpt serve --n_head N", adapters)
    if gpt.tokenizer is None:
        raise UserError(f"{source} was trained on bare ids and has no tokenizer: serve needs one to speak text")
    training_text = open_training_text(options.data_path, gpt.tokenizer) if options.data_path else None
    metrics = Metrics()
    limits = Limits(options.max_queue, options.queue_seconds, options.request_seconds)
    worker = Worker(gpt.engine(max_slots=options.max_slots), metrics, limits)
    about: dict[str, Any] = {
        "training_text": training_text,
        "sample_prompts": gpt.sample_prompts,
        "frozen_sha256": frozen.sha256 if frozen else None,
    }
    if gpt.adapters is None:
        return Service(name, gpt.config, gpt.tokenizer, worker, metrics, **about)
    base = gpt.adapters.base
    assert base.tokenizer is not None
    service = Service(name, base.config, base.tokenizer, worker, metrics, **about)
    return service.with_adapters(gpt.adapters.adapters)


def _announce(service: Service, listener: socket.socket, has_key: bool) -> None:
    host, port = listener.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    prompt = (*service.sample_prompts, "Once upon a time")[0]
    body = json.dumps({"model": service.name, "prompt": prompt, "max_tokens": 30}, ensure_ascii=False)
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    note(
        f"serving {service.name}: context {service.config.block_size}, {service.worker.engine.slots.n_slot} slots, "
        f"{service.worker.limits.max_queue} more may wait"
    )
    if service.adapters:
        note(f"adapters: {', '.join(adapter.name for adapter in service.adapters)}")
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
