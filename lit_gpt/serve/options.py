"""The options of `serve` and its help. Imports no torch: `serve --help` answers at once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from lit_gpt.console.options import CommandParser, help_page, make_parser
from lit_gpt.errors import UserError

_GROUPS = {
    "the model and the address": (
        *("ckpt_path", "init_from", "host", "port", "adapter", "served_model_name", "data_path", "n_head"),
    ),
    "speed": ("precision", "device", "max_slots"),
    "who may use it": ("api_key", "api_key_file", "allowed_hosts", "insecure"),
    "limits": ("max_queue", "queue_seconds", "request_seconds"),
    "the options themselves": ("config", "print_config", "help"),
}
_EXAMPLES = {
    "the newest run, and its page at http://127.0.0.1:8000/": "lit_gpt serve --ckpt_path last",
    "a model of the hub, in int8": "lit_gpt serve --init_from openai-community/gpt2 --precision int8 --port 8080",
    "a base and two adapters, each a model of the API": (
        "lit_gpt serve --init_from gpt2 --adapter poet=runs/poet/best.ckpt --adapter clerk=clerk_peft/"
    ),
    "for other machines, with a key": "lit_gpt serve --ckpt_path best --host 0.0.0.0 --api_key_file key.txt",
}
_END = """Every option is also a key of a YAML file for --config or, as LIT_GPT_SERVE__PORT, of the environment.
docs/serving.md has the API."""


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        max_queue: sequences that may wait while all slots are busy.
        queue_seconds: how long a request may wait for its first step.
        request_seconds: how long it may take in all.
        drain_seconds: how long running requests may go on after SIGTERM.
    """

    max_queue: int = 64
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0


def parse(argv: list[str]) -> Namespace:
    """The options of `lit_gpt serve`.

    Raises:
        UserError: for an unknown option or value, or options that do not go together.
    """
    options: Namespace = _parser().parse_args(argv)
    _check(options)
    return options


def print_help() -> None:
    """Print the help of `serve`."""
    print(help_page(_parser(), _EXAMPLES, _GROUPS, _END))


def _parser() -> CommandParser:
    limits = Limits()
    parser = make_parser("serve", "An OpenAI-compatible server and a web page for one checkpoint.")
    add = parser.add_argument
    add("--ckpt_path", type=str | None, help="a checkpoint, `last` or `best` of the newest run, or frozen:NAME")
    add("--init_from", type=str | None, help="what `lit_gpt convert` reads: a Hugging Face folder or id, …")
    add("--n_head", type=int | None, help='heads of --init_from, which a .pth of "LLMs from scratch" does not say')
    text = "NAME=PATH of an adapter over it, which requests then call NAME; can be given several times"
    add("--adapter", action="append", type=str, default=[], help=text)
    add("--host", type=str, default="127.0.0.1", help="address to listen on; others than loopback need an API key")
    add("--port", type=int, default=8000, help="0 for any free one")
    add("--precision", type=str, default="auto", help="of the weights: auto, fp32, bf16, int8 or int4")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--max_slots", type=int | None, help="sequences that run at once; by default what half of the memory holds")
    add("--max_queue", type=int, default=limits.max_queue, help="sequences that may wait; beyond it the answer is 429")
    add("--queue_seconds", type=float, default=limits.queue_seconds, help="longest wait for a slot")
    add("--request_seconds", type=float, default=limits.request_seconds, help="longest time for a whole request")
    add("--api_key", type=str | None, help="clients must send Authorization: Bearer KEY (also LIT_GPT_SERVE__API_KEY)")
    add("--api_key_file", type=str | None, help="a file that holds the key, invisible in process lists")
    add("--insecure", type=bool, default=False, help="true: listen beyond loopback without a key")
    add("--allowed_hosts", type=list[str], default=[], help="names under which the server is reached; [*] for any")
    add("--data_path", type=str | None, help="the prepared folder that it was trained on, to show what followed there")
    add("--served_model_name", type=str | None, help="what requests call the model; by default the checkpoint's name")
    return parser


def _check(options: Namespace) -> None:
    if (options.ckpt_path is None) == (options.init_from is None):
        raise UserError("serve needs a checkpoint: give either --ckpt_path X or --init_from gpt2")
    if options.n_head is not None and options.init_from is None:
        raise UserError(f"--n_head {options.n_head} is for --init_from: leave it out, or name the source there")
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
