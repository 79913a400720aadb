"""What the fuzz tests share: how long they run, damaged bytes, and values of any kind in place of others."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LIT_GPT_FUZZ_EXAMPLES", "40"))
"""Of each fuzz test; a longer run sets the variable: `LIT_GPT_FUZZ_EXAMPLES=5000 pytest -k fuzz`."""
fuzz = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize="LIT_GPT_FUZZ_EXAMPLES" not in os.environ,
    database=None,
)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**30), st.floats(), st.text(max_size=5), st.just("1")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
"""Plain values."""


@st.composite
def damaged(draw: st.DrawFn, content: bytes, first: int | None = None) -> bytes:
    """`content` with some of its `first` bytes changed, or cut off there."""
    limit = len(content) if first is None else min(first, len(content))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, limit - 1))] ^= draw(st.integers(1, 255))
    return bytes(data) if draw(st.integers(0, 9)) else bytes(data[: draw(st.integers(0, limit))])


@st.composite
def changed(draw: st.DrawFn, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with something in it, at any depth, removed or in place of it a value of any kind."""
    result = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 2))):
        inside: Any = result
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not keys:
                break
            key = draw(st.sampled_from(keys[:40] + keys[-40:]))
            deeper = isinstance(inside[key], (dict, list)) and len(inside[key]) > 0
            if deeper and draw(st.integers(0, 3)):
                inside = inside[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del inside[key]
            else:
                other = inside[draw(st.sampled_from(keys))]  # of a kind that may be right
                inside[key] = copy.deepcopy(other) if draw(st.booleans()) else draw(VALUES)
            break
    return result
