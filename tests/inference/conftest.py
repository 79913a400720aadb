"""The kernels' levels: tests that ask for `level` run once for each that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lit_gpt.inference import native


@pytest.fixture(scope="module", params=native.levels() or ["none"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels compute with the instructions of this level."""
    if native.load() is None:
        pytest.skip(f"kernels: {native.status()}")
    before = native.used_level()
    native.use_level(request.param)
    yield request.param
    native.use_level(before)
