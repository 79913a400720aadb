"""The checkpoint of an adapter: the trained terms alone, and which base they belong to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.model.lora import LoRAConfig

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterEntry:
    """What the checkpoint of an adapter says of its base, and how its terms were trained.

    Attributes:
        base: where the base was: a path, or an id of the hub.
        base_sha256: of the base's weights, as hexadecimal digits; another base is refused.
        first_token: the first id that the base's tokenizer lacks: rows from there on are the adapter's.
        lora: rank, scale and targets.
    """

    base: str
    base_sha256: str
    first_token: int
    lora: LoRAConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> AdapterEntry:
        """The inverse of `to_dict`, of a file that `where` names.

        Raises:
            UserError: for a value that is missing, or is none that `fit` writes.
        """
        base, digest = values.get("base"), values.get("base_sha256")
        first = values.get("first_token")
        if not isinstance(base, str) or not base or not base.isprintable():
            raise UserError(f"{where}: its base is {brief(base)}, no path and no id: use another")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise UserError(f"{where}: its base_sha256 is {brief(digest)}, not 64 hexadecimal digits: use another")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise UserError(f"{where}: its first_token is {brief(first)}, no token id: use another")
        return cls(base, digest, first, lora_config(values.get("lora"), where))

    def check_base(self, sha256: str, name: str, where: str) -> None:
        """Refuse another base than the one that the adapter was trained on.

        Args:
            sha256: of the weights at hand.
            name: what the user called it.
            where: how the error names the adapter.

        Raises:
            UserError: with both hashes.
        """
        if sha256 != self.base_sha256:
            raise UserError(
                f"{where} was trained on another base than {name}: its weights have the hash {self.base_sha256[:12]}, "
                f"these {sha256[:12]}; give the base that it came from ({self.base})"
            )


def lora_config(values: object, where: str) -> LoRAConfig:
    """A `LoRAConfig` from plain values of a file. Raises UserError for what is none, or trains nothing."""
    known = [item.name for item in dataclasses.fields(LoRAConfig)]
    if not isinstance(values, dict):
        raise UserError(f"{where}: its lora is {brief(values)}, no group of options: use another")
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown lora.{str(name)[:80]}: {nearest(str(name)[:80], known)}")
    try:
        lora = LoRAConfig(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if lora.rank == 0:
        raise UserError(f"{where}: an adapter of rank 0 is none: use another")
    return lora
