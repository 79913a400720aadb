"""`lit_gpt tokenize`: tokens and ids of a text side by side, ids to text, comparison of tokenizers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypedDict

from lit_gpt.console.messages import note
from lit_gpt.console.options import make_parser
from lit_gpt.errors import UserError, nearest
from lit_gpt.tokenizer.printable import show_bytes, show_token
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer, is_trained
from lit_gpt.tokenizer.train import train_tokenizer

FILE = "FILE:"
"""A text that starts so names a file instead, as in `predict --start`."""

_SHOWN = 24  # tokens in a row of the comparison


class TokenRow(TypedDict):
    """A token: its id, its printable text, its bytes in hexadecimal."""

    id: int
    piece: str
    bytes: str


class Summary(TypedDict):
    """What a tokenizer makes of a text; `pieces` has the printable text of its first tokens."""

    tokenizer: str
    vocabulary: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    pieces: list[str]


def main(argv: list[str]) -> int | None:
    """`lit_gpt tokenize`."""
    args = _parser().parse_args(argv)
    if args.format not in ("table", "json"):
        raise UserError(f"format {args.format!r} is unknown: {nearest(args.format, ['table', 'json'])}")
    if args.decode:
        if args.text is not None:
            raise UserError("give a text to encode or --decode with ids, not both")
        return _decode(args)
    text = read_text(args.text)
    tokenizers = _tokenizers(args, text)
    if len(tokenizers) == 1:
        _show(pieces(tokenizers[0], text), summary(tokenizers[0], text), args.format)
    else:
        _compare([summary(tokenizer, text) for tokenizer in tokenizers], args.format)
    return 0


def read_text(text: str | None) -> str:
    """The text itself, the content of `FILE:path`, or standard input for None and `-`.

    Raises:
        UserError: a file that cannot be read as UTF-8, or no text at all.
    """
    try:
        if text is None or text == "-":
            if sys.stdin.isatty():
                raise UserError('no text: lit_gpt tokenize "some text", FILE:path, or pipe it in')
            found = sys.stdin.read()
        else:
            found = Path(text[len(FILE) :]).read_text(encoding="utf-8") if text.startswith(FILE) else text
    except OSError as error:
        raise UserError(f"{text}: {error.strerror or error}; name a text file after {FILE}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{text or 'standard input'} is not UTF-8 (byte {error.start}): convert it first") from None
    if not found:
        raise UserError("the text is empty: give at least one character")
    return found


def pieces(tokenizer: Tokenizer, text: str) -> list[TokenRow]:
    """One row for each token: its id, its printable text, and its bytes in hexadecimal."""
    return [_row(tokenizer, token) for token in tokenizer.encode(text)]


def _row(tokenizer: Tokenizer, token: int) -> TokenRow:
    return {"id": token, "piece": show_token(tokenizer, token), "bytes": tokenizer.token_bytes(token).hex(" ")}


def summary(tokenizer: Tokenizer, text: str) -> Summary:
    """The number of tokens of `text`, and the bytes and characters per token.

    >>> summary(get_tokenizer("byte"), "你好")["bytes_per_token"]
    1.0
    """
    ids = tokenizer.encode(text)
    return {
        "tokenizer": tokenizer.name,
        "vocabulary": tokenizer.n_vocab,
        "tokens": len(ids),
        "bytes_per_token": len(text.encode("utf-8", "replace")) / len(ids),
        "characters_per_token": len(text) / len(ids),
        "pieces": [show_bytes(tokenizer.token_bytes(token)) for token in ids[:_SHOWN]],
    }


def _tokenizers(args: Any, text: str | None) -> list[Tokenizer]:
    specs = args.tokenizer or ([] if args.ckpt_path else ["gpt2"])
    found = [_from_checkpoint(args.ckpt_path)] if args.ckpt_path else []
    for spec in specs:
        if text is not None and is_trained(spec):
            note(f"{spec} is trained on this very text: it fits it better than any other")
            found.append(train_tokenizer(spec, [text]))
        else:
            found.append(get_tokenizer(spec))
    return found


def _from_checkpoint(path: str) -> Tokenizer:
    from lit_gpt.checkpoint.format import read_header, resolve_ckpt_path

    header = read_header(resolve_ckpt_path(path))
    if header.tokenizer is None:
        raise UserError(f"checkpoint {path} was trained on bare ids and has no tokenizer: name one with --tokenizer")
    return Tokenizer.from_dict(header.tokenizer, path)


def _decode(args: Any) -> int:
    tokenizers = _tokenizers(args, None)
    if len(tokenizers) != 1:
        raise UserError("ids mean something to one tokenizer only: give one with --decode")
    tokenizer = tokenizers[0]
    ids = [_token_id(word, tokenizer) for word in args.decode for word in word.replace(",", " ").split()]
    if args.format == "json":
        rows = [_row(tokenizer, token) for token in ids]
        print(json.dumps({"text": tokenizer.decode(ids), "tokens": rows}, ensure_ascii=False))
    else:
        print(tokenizer.decode_bytes(ids).decode("utf-8", "backslashreplace"))
    return 0


def _token_id(word: str, tokenizer: Tokenizer) -> int:
    word = word.strip("[]")
    if not word.isdigit():
        raise UserError(f"--decode takes token ids, and {word!r} is no whole number")
    if int(word) >= tokenizer.n_vocab:
        raise UserError(f"id {word} is outside {tokenizer.name}'s vocabulary: ids are below {tokenizer.n_vocab}")
    return int(word)


def _show(rows: list[TokenRow], total: Summary, style: str) -> None:
    if style == "json":
        print(json.dumps({**{k: v for k, v in total.items() if k != "pieces"}, "rows": rows}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("#", "id", "piece", "bytes", title=_headline(total), title_justify="left")
    for position, row in enumerate(rows):
        table.add_row(str(position), str(row["id"]), escape(row["piece"]), row["bytes"])
    Console(highlight=False).print(table)


def _headline(total: Summary) -> str:
    return f"{total['tokenizer']}: {total['tokens']} tokens, {total['bytes_per_token']:.2f} bytes per token"


def _compare(totals: list[Summary], style: str) -> None:
    if style == "json":
        print(json.dumps(totals, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("tokenizer", title="One text, several tokenizers", title_justify="left")
    for column in ("vocabulary", "tokens", "bytes/token", "characters/token"):
        table.add_column(column, justify="right")
    table.add_column("pieces", overflow="fold")
    for row in totals:
        shown = "|".join(row["pieces"]) + ("|…" if row["tokens"] > _SHOWN else "")
        figures = (f"{row['bytes_per_token']:.2f}", f"{row['characters_per_token']:.2f}")
        table.add_row(row["tokenizer"], f"{row['vocabulary']:,}", f"{row['tokens']:,}", *figures, escape(shown))
    Console(highlight=False).print(table)


def _parser() -> Any:
    parser = make_parser("tokenize", "Text to pieces and ids side by side, ids to text, tokenizers compared.")
    parser.add_argument("text", nargs="?", default=None, help="the text, FILE:path, or standard input if left out")
    parser.add_argument("--decode", nargs="+", type=str, default=[], help="token ids to turn into text instead")
    parser.add_argument(
        "--tokenizer",
        nargs="+",
        type=str,
        default=[],
        help="gpt2, cl100k_base, byte, a folder or file of `lit_gpt prepare`; char and bpe:N learn from the text "
        "itself. With several, they are compared",
    )
    parser.add_argument("--ckpt_path", type=str | None, help="a checkpoint, whose tokenizer is used")
    parser.add_argument("--format", type=str, default="table", help="table or json")
    return parser
