"""The inputs of prepare: files, folders, globs and the standard library, found once and in order."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import pytest
from preparing import write

from lit_gpt.data.sources import find_sources
from lit_gpt.data.text_source import TextSource
from lit_gpt.errors import UserError

POEM = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"


def names(found: list[TextSource]) -> list[str]:
    return [source.path.name for source in found]


def test_files_folders_and_globs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/d.jsonl.gz", ".hidden/e.txt", "picture.png", "out/index.json"):
        write(tmp_path / name, "x")
    write(tmp_path / "empty.txt", "")
    downloads = tmp_path / "out" / ".downloads"
    assert names(find_sources([str(tmp_path)], downloads)) == ["a.md", "b.txt", "c.py", "d.jsonl.gz"]
    assert names(find_sources([f"{tmp_path}/**/*.py", f"{tmp_path}/b.txt", str(tmp_path)], downloads)) == [
        "c.py",
        "b.txt",
        "a.md",
        "d.jsonl.gz",
    ]
    assert names(find_sources([f"{tmp_path}/picture.png"], downloads)) == ["picture.png"]  # named, so it is tried


def test_stdlib_is_this_pythons_source_without_its_tests(tmp_path: Path) -> None:
    found = find_sources(["stdlib"], tmp_path)
    paths = [source.path.relative_to(sysconfig.get_path("stdlib")).as_posix() for source in found]
    assert paths == sorted(paths) and "argparse.py" in paths and "email/message.py" in paths
    assert not any(re.search(r"(^|/)(tests?|site-packages)/", path) for path in paths)
    assert found[0].name.startswith("stdlib:")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("poem.text", 'no file or folder "{}": did you mean "poem.txt"'),
        ("nowhere/poem.txt", "no file or folder"),
        ("*.csv", "matches no file"),
        ("empty.txt", "the file is empty"),
        ("pictures", "no text files"),
    ],
)
def test_what_is_not_there_is_named(name: str, says: str, tmp_path: Path) -> None:
    write(tmp_path / "poem.txt", POEM)
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "pictures/a.png", "x")
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(says.format(path))) as error:
        find_sources([path], tmp_path / "out" / ".downloads")
    assert path in str(error.value) and "\n" not in str(error.value)
