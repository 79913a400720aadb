"""Printable tokens: text where the bytes are whole characters, escaped bytes elsewhere."""

from __future__ import annotations

from lit_gpt.tokenizer.tokenizer import Tokenizer

_SPACE = "␣"
_CONTROL = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def show_bytes(data: bytes) -> str:
    r"""The characters of `data`, with bytes that are no whole character as `\xe5`, never as U+FFFD.

    Spaces at either end become visible; control characters and backslashes are escaped.

    >>> print(show_bytes(b" world"), show_bytes("农".encode()[:2]), show_bytes(b"\n"))
    ␣world \xe5\x86 \n
    """
    text = data.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    shown = "".join(_CONTROL.get(c, c if c.isprintable() or c == " " else _escaped(c)) for c in text)
    body = shown.strip(" ")
    if not body:
        return _SPACE * len(shown)
    before = len(shown) - len(shown.lstrip(" "))
    return _SPACE * before + body + _SPACE * (len(shown) - before - len(body))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def show_end(data: bytes, characters: int) -> str:
    r"""The last `characters` of a text as `show_bytes` shows them, after … where there are more.

    >>> print(show_end("农夫山泉".encode(), 3), show_end("农夫".encode()[:-1], 2))
    …夫山泉 …\xe5\xa4
    """
    text = data.decode("utf-8", "surrogateescape")  # a byte that is no whole character counts as one
    end = show_bytes(text[-characters:].encode("utf-8", "surrogateescape"))
    return f"…{end}" if len(text) > characters else end


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """One id as `show_bytes` shows its bytes; a special token by its name, an id that means nothing as `#id`."""
    data = tokenizer.token_bytes(token)
    return show_bytes(data) if data else _name(tokenizer, token)


def named_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one id inside a text; those of its name, in UTF-8, where it has none."""
    return tokenizer.token_bytes(token) or _name(tokenizer, token).encode()


def _name(tokenizer: Tokenizer, token: int) -> str:
    """The name of a special token, or `#id`."""
    names = {value: name for name, value in tokenizer.specials.items()}
    return names.get(token, f"#{token}")
