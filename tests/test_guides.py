"""The guides with lines to run: they print what stands below them, and the Chinese versions have the same."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from environment import FIXTURES, ROOT

from lit_gpt.__main__ import main

DOCS = ROOT / "docs"
PAIRS = [
    *((DOCS / f"{name}.md", DOCS / f"{name}.zh.md") for name in ("parts", "decoding", "troubleshooting", "tutorial")),
    (ROOT / "README.md", ROOT / "README.zh.md"),
]
"""English and Chinese."""
PARTS, DECODING, TROUBLE = PAIRS[:3]
SHOWN = re.compile(r"^```python\n((?:(?!```).)*)^```\n\n```text\n((?:(?!```).)*)^```", re.MULTILINE | re.DOTALL)
"""Lines of Python, and what they print."""


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PARTS, *DECODING], ids=lambda path: path.name)
def test_the_lines_print_what_stands_below_them(path: Path) -> None:
    names: dict[str, object] = {}
    blocks = SHOWN.findall(path.read_text("utf-8"))
    assert len(blocks) >= 4
    try:
        for lines, shown in blocks:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(lines, names)
            assert output.getvalue() == shown
    finally:
        torch.set_printoptions("default")


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda path: path.name)
def test_both_languages_have_the_same_headings_lines_figures_and_pictures(english: Path, chinese: Path) -> None:
    texts = [path.read_text("utf-8") for path in (english, chinese)]
    for pattern in (
        r"^(#+) ",
        r"^```(?:bash|console|python)$.*?^```$",
        r"\]\(([\w./]+\.(?:svg|png))\)",
        r"`((?:lit_gpt|LIT_GPT_ISA|scripts/|--)[^`]*)`",
        r"^\| (`[^|]+?) \|",  # the first cell of a table's row
        r"\*\*(\d[\d.]*)",
    ):
        first, second = (sorted(re.findall(pattern, text, re.MULTILINE | re.DOTALL)) for text in texts)
        assert first == second
    rows = [[line.count("|") for line in text.splitlines() if line.startswith("| ")] for text in texts]
    assert rows[0] == rows[1]


def test_the_pictures_of_the_parts_are_there() -> None:
    pictures = re.findall(r"\]\((parts/\w+\.svg)\)", PARTS[0].read_text("utf-8"))
    assert len(pictures) == 5 and all((DOCS / picture).is_file() for picture in pictures)


def test_the_commands_of_the_parts_run(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"`lit_gpt ([^`]*)`", PARTS[0].read_text("utf-8"))
    assert len(commands) == 3
    for command in commands:
        assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert all(figure in text for figure in ("163,009,536", "(2, 4, 3,072)", "8,120,736", "16,606,976"))


@pytest.mark.slow
@pytest.mark.parametrize(("guide", "count"), [(TROUBLE[0], 9), (DECODING[0], 6)], ids=["troubleshooting", "decoding"])
def test_the_commands_of_a_guide_run(
    guide: Path, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "lightning_logs/version_0/checkpoints"
    run.mkdir(parents=True)
    for name in ("last", "best"):
        shutil.copy(FIXTURES / "modern.ckpt", run / f"{name}.ckpt")
    commands = re.findall(r"^\$ lit_gpt (.*)", guide.read_text("utf-8"), re.MULTILINE)
    assert len(commands) >= count
    forms = {re.sub(r"[\d.]+", "0", command): command for command in commands}  # they differ in numbers otherwise
    for command in forms.values():
        assert main(shlex.split(command)) == 0, (command, capsys.readouterr().err)
        assert capsys.readouterr().out.strip()


def test_the_settings_for_a_purpose_are_settings() -> None:
    from lit_gpt.generation.generation_config import GenerationConfig

    table = DECODING[0].read_text("utf-8").split("## Settings for a purpose\n")[1].split("\n## ")[0]
    found = re.findall(r"`(--[^`]+)`", table)
    assert len(found) >= 6
    for flags in found:
        words = flags.split()
        values = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2]))
        typed = {name: value if name == "strategy" else float(value) for name, value in values.items()}
        GenerationConfig.from_dict({name: int(v) if name.startswith("num_") else v for name, v in typed.items()})
