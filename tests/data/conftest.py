"""A corpus, and what `prepare` makes of it in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
from preparing import CHINESE, CODE, OPTIONS, files

from lit_gpt.data.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 texts, one of more than a job: about 2 MB."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = (f"{CHINESE if line % 3 else CODE}{number * line}\n" for line in range(11_000 if number == 5 else 500))
        (folder / f"{number:02d}.txt").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus prepared in one go, in this process."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    prepare(str(corpus), folder, **OPTIONS)
    assert len(files(folder)) == 9  # three shards a split
    return folder
