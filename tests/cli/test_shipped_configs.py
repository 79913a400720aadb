"""The configurations that an installed package carries along."""

from __future__ import annotations

from pathlib import Path

import pytest
from environment import ROOT, RunProgram

from lit_gpt.cli.shipped_configs import SHIPPED, use_shipped_configs


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_package_has_every_configuration() -> None:
    assert {path.name for path in SHIPPED.glob("*.yaml")} == {path.name for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("words", [["--config", "{}"], ["--config={}"], ["-c", "{}"]])
def test_a_configuration_that_is_not_here_is_the_installed_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["fit", *(word.format("configs/quickstart.yaml") for word in words), "--trainer.max_steps", "1"]
    expected = ["fit", *(word.format(SHIPPED / "quickstart.yaml") for word in words), "--trainer.max_steps", "1"]
    assert use_shipped_configs(argv) == expected
    assert str(SHIPPED / "quickstart.yaml") in capsys.readouterr().err


def test_a_file_in_the_current_folder_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text("trainer: {max_steps: 1}")
    argv = ["fit", "--config", "configs/quickstart.yaml"]
    assert use_shipped_configs(argv) == argv
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["quickstart.yaml", "my/configs/quickstart.yaml", "configs/mine.yaml", "configs", ""])
def test_other_paths_are_left_for_the_parser(name: str) -> None:
    argv = ["fit", "--config", name, "--data.path", "configs/quickstart.yaml"]
    assert use_shipped_configs(argv) == argv


@pytest.mark.slow
def test_the_example_of_the_help_is_read_outside_of_a_checkout(program: RunProgram) -> None:
    done = program("fit", "--config", "configs/quickstart.yaml", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "data/stdlib" in done.stdout
    assert "there is no configs/quickstart.yaml in this folder" in done.stderr
