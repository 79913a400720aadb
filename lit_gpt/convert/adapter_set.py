"""The adapters that `--adapter NAME=PATH` names, opened over one base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_gpt.convert.adapters import Adapter
from lit_gpt.convert.recognise import open_adapter
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.lora import NamedAdapters
from lit_gpt.tokenizer.tokenizer import Tokenizer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class AdapterSet:
    """Adapters over one base.

    Attributes:
        base: their base.
        adapters: by their names, in their order.
        config: the shape of the base with the vocabulary of all.
        tokenizer: of all.
    """

    base: SourceCheckpoint
    adapters: Mapping[str, Adapter]
    config: GPTConfig
    tokenizer: Tokenizer | None

    @property
    def named(self) -> NamedAdapters:
        """What a model is given of them."""
        return NamedAdapters({name: adapter.weights for name, adapter in self.adapters.items()}, self.config)


def parse_adapters(words: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` of each `--adapter` as name → path.

    Raises:
        UserError: for what is not of this form, a name that the API could not use, and two of one name.
    """
    found: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise UserError(f"--adapter {word[:200]} is not NAME=PATH: write --adapter formal=runs/formal/best.ckpt")
        if not _NAME.fullmatch(name):
            raise UserError(f'--adapter {word[:200]}: "{name[:80]}" is no name: use letters, digits, ".", "_" and "-"')
        if name in found:
            raise UserError(f'--adapter names two adapters "{name}" ({found[name]} and {path}): rename one')
        found[name] = path
    return found


def open_adapters(paths: Mapping[str, str], base: SourceCheckpoint) -> AdapterSet:
    """The adapters at these paths.

    Args:
        paths: by name.
        base: whose they must be.

    Raises:
        UserError: for one that is none, is of another base, or has other new tokens than another one.
    """
    if paths and base.is_adapter:
        raise UserError(f"{base.name} is an adapter itself: give its base, and it as --adapter NAME={base.name}")
    adapters = {name: open_adapter(path, base) for name, path in paths.items()}
    config, tokenizer, grown = base.config, base.tokenizer, None
    for name, adapter in adapters.items():
        if not adapter.weights.token_rows:
            if base.tokenizer is not None and adapter.tokenizer is not None:
                _check_same_ids(name, adapter.tokenizer, base.tokenizer)
            continue
        if grown is not None and not _same_tokens(adapter, adapters[grown]):
            raise UserError(f"the adapters {grown} and {name} have different new tokens: serve them one by one")
        config, tokenizer, grown = adapter.config, adapter.tokenizer, name
    return AdapterSet(base, adapters, config, tokenizer)


def _same_tokens(one: Adapter, other: Adapter) -> bool:
    hashes = [None if each.tokenizer is None else each.tokenizer.hash for each in (one, other)]
    counts = [each.weights.token_rows["wte"].shape for each in (one, other)]
    firsts = [each.weights.first_token for each in (one, other)]
    return hashes[0] == hashes[1] and counts[0] == counts[1] and firsts[0] == firsts[1]


def _check_same_ids(name: str, tokenizer: Tokenizer, base: Tokenizer) -> None:
    if tokenizer.hash != base.hash:
        raise UserError(
            f'the adapter {name} has the tokenizer "{tokenizer.name}", its base "{base.name}", and they differ: use '
            f"the base that it was trained on"
        )
