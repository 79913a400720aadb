"""scripts/compare_strategies.py: its figures by hand, and both of its forms on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from environment import FIXTURES, ROOT

from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.strategy_table import STRATEGIES


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_strategies", ROOT / "scripts/compare_strategies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_distinct_and_repetition(script: ModuleType) -> None:
    assert script.distinct([1, 2, 1, 2, 3], 2) == 3 / 4  # 12, 21, 12, 23
    assert script.distinct([1], 2) == 0
    assert script.repetition([1, 2, 1, 3, 3]) == 2 / 5
    assert script.repetition([1, 2, 3, 1], window=2) == 0


def test_a_text_in_a_cell_of_a_table(script: ModuleType) -> None:
    assert script.in_a_cell("a\nb|c") == "`a⏎b\\|c`"
    assert script.in_a_cell("a`b") == "`` a`b ``"
    assert script.in_a_cell("x" * 91) == f"`{'x' * 90}…`"


@pytest.mark.parametrize("name", ["decoding.md", "decoding.zh.md"])
def test_the_guides_have_every_sweep_and_its_picture(script: ModuleType, name: str) -> None:
    sections = (ROOT / "docs" / name).read_text("utf-8").split("\n### ")
    for title, setting, values, beside in script.SWEEPS:
        picture = script.picture_name(setting, beside)
        (section,) = [section for section in sections if f"](decoding/{picture})" in section]
        cells = re.findall(r"^\| ([\d.]+) \| (?:[-\d.%]+ \| ){4}`", section, re.MULTILINE)
        assert cells == [f"{value:g}" for value in values], title
        assert f"`--{setting}`" in section and (ROOT / "docs/decoding" / picture).is_file()


def test_every_sweep_is_of_a_setting_that_takes_its_values(script: ModuleType) -> None:
    for _, setting, values, beside in script.SWEEPS:
        for value in values:
            assert GenerationConfig.from_dict({**beside, setting: value}).check() == []


def test_every_strategy_is_compared(script: ModuleType) -> None:
    assert {settings.get("strategy", "sample") for _, settings in script.CASES} >= set(STRATEGIES)


@pytest.mark.slow
def test_both_forms(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare_strategies.py", str(FIXTURES / "modern.ckpt"), "First", "--max_new_tokens", "4"]
    monkeypatch.setattr(sys, "argv", [*words, "--repeats", "1"])
    script.main()
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text and f"**{name}**" in text for name, _ in script.CASES)
    monkeypatch.setattr(script, "SAMPLES", 2)
    of_each_strategy = {sweep[3].get("strategy"): sweep for sweep in script.SWEEPS}  # the others differ in numbers
    ends = [(*sweep[:2], (sweep[2][0], sweep[2][-1]), sweep[3]) for sweep in of_each_strategy.values()]
    monkeypatch.setattr(script, "SWEEPS", ends)
    monkeypatch.setattr(sys, "argv", [*words, "--sweeps", str(tmp_path / "plots")])
    script.main()
    text = capsys.readouterr().out
    for title, _, values, _ in ends:
        section = text.split(f"### {title}\n")[1].split("\n### ")[0]
        assert section.count("\n| ") == len(values) + 1 and "svg" in section
    assert len(list((tmp_path / "plots").glob("*.svg"))) == len(script.SWEEPS)
