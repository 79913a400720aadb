"""What the tests of the hub share: the server, and the program in a process that asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fork_server import ForkServer
from hub_server import Hub, running_hub


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer
) -> Iterator[tuple[Hub, Callable[..., Any], dict[str, str]]]:
    """The server, the program in a process that asks it, and the settings of that process."""
    with running_hub(tmp_path_factory.mktemp("cache"), fork_server) as running:
        yield running
