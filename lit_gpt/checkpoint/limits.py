"""Limits on what a file may say of its model: it is compared with what the file holds, before memory is spent on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import GPTConfig

_SMALL_TABLE = 64 << 20  # bytes of a table of positions that any model may have
_SMALL_MODEL = 1 << 20  # weights that any file may describe
_MAX_VALUES, _MAX_DEPTH, _MAX_INT = 100_000, 32, 1 << 63


def check_fits(config: GPTConfig, shapes: Iterable[tuple[int, ...]], where: str) -> None:
    """Refuse a config that describes a larger model than these tensors can be.

    Args:
        config: the model's shape, as the file has it.
        shapes: of the tensors in the file.
        where: how errors name the file.

    Raises:
        UserError: naming what is too large.
    """
    sizes = [_product(shape) for shape in shapes]
    if config.n_layer > len(sizes):
        raise UserError(f"{where}: n_layer={config.n_layer}, but the file has {len(sizes)} tensors: it is damaged")
    if config.least_weights() > max(_SMALL_MODEL, 2 * sum(sizes)):  # of a small one the missing tensors are named later
        raise UserError(
            f"{where}: its config describes at least {config.least_weights():,} weights, the file has {sum(sizes):,}: "
            "it is damaged"
        )
    if config.position_table_bytes() > max(_SMALL_TABLE, 4 * sum(sizes)):
        raise UserError(
            f"{where}: a table of block_size={config.block_size} positions is larger than all its weights: lower it"
        )


def check_plain(value: Any, where: str) -> None:
    """Refuse plain values that are nested deeply or without end, are too many, or are no plain values.

    Raises:
        UserError: naming `where`.
    """
    left, count = [(value, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise UserError(f"{where} holds more or deeper values than any checkpoint: get or write it again")
        if isinstance(value, Mapping):
            left += [(item, depth + 1) for item in value] + [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple)):
            left += [(item, depth + 1) for item in value]
        elif not isinstance(value, (str, int, float, type(None))):
            raise UserError(f"{where} holds a {type(value).__name__}, no plain value: get or write it again")
        elif isinstance(value, int) and abs(value) >= _MAX_INT:
            raise UserError(f"{where} holds the number {brief(value)}: get or write it again")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
