"""What is resolved before the Trainer is built."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace

from lit_gpt.cli.resolve import rank_count


@pytest.mark.parametrize(
    ("devices", "num_nodes", "expected"),
    [(2, 1, 2), ("2", 3, 6), ([0, 2, 3], 1, 3), ("0,2,", 2, 4), ("auto", 2, 2), (-1, 1, 1)],
)
def test_ranks_are_counted_from_every_form_of_devices(
    devices: int | str | list[int], num_nodes: int, expected: int
) -> None:
    assert rank_count(Namespace(devices=devices, num_nodes=num_nodes)) == expected
