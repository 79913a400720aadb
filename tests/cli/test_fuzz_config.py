"""The parser of config files: any YAML is parsed, or refused in one line with status 2; never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from environment import ROOT
from fuzzing import EXAMPLES, VALUES, changed, damaged, fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.__main__ import main
from lit_gpt.cli.lightning import Program

CONFIG = ROOT / "configs" / "quickstart.yaml"
fewer = settings(fuzz, max_examples=max(1, EXAMPLES // 4))
"""Each example builds the parser of `fit` anew, a quarter of a second."""


class Parsed(BaseException):
    """The file was parsed, and what comes after it is not under test."""


@pytest.fixture
def parser_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(program: Program) -> None:
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Program, "before_instantiate_classes", stop)


def parsed_or_refused(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_bytes(content)
    try:
        status = main(["fit", "--config", "config.yaml"])
    except Parsed:
        return
    except SystemExit as ended:
        status = int(str(ended.code))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("lit_gpt: error: ") and len(lines[0]) < 3000, lines


@pytest.mark.slow
@fewer
@given(data=st.data())
def test_fuzz_bytes_of_a_config_file(
    data: st.DataObject, parser_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed_or_refused(data.draw(damaged(CONFIG.read_bytes()) | st.binary(max_size=60)), capsys)


@pytest.mark.slow
@fewer
@given(data=st.data())
def test_fuzz_values_of_a_config_file(
    data: st.DataObject, parser_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    text = yaml.safe_dump(data.draw(changed(values) | VALUES), allow_unicode=True)
    parsed_or_refused(text.encode("utf-8", "surrogateescape"), capsys)


@pytest.mark.parametrize("command", ["fit", "serve"])
def test_a_config_file_that_is_no_text_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was status 1 with a UnicodeDecodeError."""
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes("port: 1  # für\n".encode("latin-1"))
    assert main([command, "--config", "latin.yaml"]) == 2
    assert capsys.readouterr().err == "lit_gpt: error: latin.yaml is not UTF-8 at byte 12: save it as UTF-8\n"


@pytest.mark.parametrize("text", ["model: null", "trainer: null", "data: null", "model: {config: null}"])
def test_a_group_that_is_null_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model: null` was status 1 with an AttributeError."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    assert main(["fit", "--config", "config.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and text.split(":")[-2].strip(" {") in lines[0]
