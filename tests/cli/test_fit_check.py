"""Configurations of `fit` that are checked and resolved without training, as a sweep has it done."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.cli.fit_check import FitCheck, answer
from lit_gpt.model.config import GPTConfig

SETTINGS = """
model: {config: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}}
data: {batch_size: 8, source: text.py, path: tokens, tokenizer: byte, val_split: "tail:0.1"}
trainer: {accelerator: cpu, precision: 32-true, max_steps: 7, val_check_interval: 4, check_val_every_n_epoch: null}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    Path("base.yaml").write_text(SETTINGS)
    return tmp_path


def ask(*flags: list[str], budget: tuple[str, float] | None = None) -> list[dict[str, Any]]:
    return answer({"configs": ["base.yaml"], "flags": list(flags), "budget": budget})


@pytest.mark.slow
def test_all_are_checked_before_anything_is_prepared(folder: Path) -> None:
    answers = ask(
        ["--model.optimizer.lr=1e-2"],
        ["--model.optimizer.muon_lrr=1"],
        ["--model.config.n_head=3"],
        ["--model.optimizer.beta1=2"],
        ["--trainer.logger=false"],
        ["--ckpt_path=last"],
    )
    assert answers[0] == {}
    expected = [
        'did you mean "--model.optimizer.muon_lr"?',
        "n_embd=16 is not divisible by n_head=3",
        "beta1=2.0 must lie in [0, 1)",
        "leave trainer.logger",
        "ckpt_path=last",
    ]
    for found, message in zip(answers[1:], expected):
        assert message in found["error"]
    assert sorted(path.name for path in folder.iterdir()) == ["base.yaml", "text.py"]


@pytest.mark.slow
def test_a_configuration_does_not_change_the_next_one(folder: Path) -> None:
    """A preset's values become the parser's defaults."""
    program = FitCheck()
    bare, preset = ["--config", "base.yaml"], ["--config", "base.yaml", "--model.preset=nano"]
    before = program.check(bare).options.as_dict()
    changed = program.check(preset).options.as_dict()
    after = program.check(bare).options.as_dict()
    assert changed["model"]["config"]["position"] == "rope"
    assert before["model"] == after["model"] != changed["model"]


@pytest.mark.slow
def test_budgets_become_steps_of_the_configuration(folder: Path) -> None:
    tokens = 8 * 16
    flops = 3 * GPTConfig(vocab_size=257, n_layer=2, n_head=2, n_embd=16, block_size=16).forward_flops_per_token()
    for budget, steps in (
        (("steps", 12), 12),
        (("tokens", 12 * tokens + 5), 12),
        (("flops", 12 * tokens * flops), 12),
    ):
        (found,) = ask(["--model.config.n_layer=2"], budget=budget)
        trainer = found["config"]["trainer"]
        assert found["config"]["model"]["config"]["vocab_size"] == 257
        assert (trainer["max_steps"], trainer["max_epochs"], trainer["max_time"]) == (steps, -1, None)
        assert steps % trainer["val_check_interval"] == 0, "the last step is validated"
    deeper, shallower = ask(["--model.config.n_layer=4"], ["--model.config.n_layer=1"], budget=("flops", 1e9))
    assert deeper["config"]["trainer"]["max_steps"] < shallower["config"]["trainer"]["max_steps"]
    (found,) = ask([], budget=("time", 90061))
    trainer = found["config"]["trainer"]
    assert (trainer["max_time"], trainer["max_steps"], trainer["val_check_interval"]) == ("01:01:01:01", -1, 4)
    (found,) = ask([], budget=("tokens", 5))
    assert "less than one step, which takes 128" in found["error"]
    (found,) = ask([])
    assert found["config"]["trainer"]["max_steps"] == 7, "without a budget the options decide"
