"""Checkpoints written before the packages were divided as they are now still load, resume and write the same texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from environment import FIXTURES

from lit_gpt import load
from lit_gpt.__main__ import main
from lit_gpt.api import Generator
from lit_gpt.checkpoint.format import read_header

EXPECTED = json.loads((FIXTURES / "texts.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=["modern", "gpt2"])
def gpt(request: pytest.FixtureRequest) -> tuple[str, Generator]:
    return request.param, load(str(FIXTURES / f"{request.param}.ckpt"), precision="fp32")


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(EXPECTED["cases"])), ids=lambda i: json.dumps(EXPECTED["cases"][i]))
def test_every_strategy_writes_the_texts_it_wrote_then(gpt: tuple[str, Generator], case: int) -> None:
    name, model = gpt
    settings: dict[str, Any] = {"max_new_tokens": 40, **EXPECTED["cases"][case]}
    count = 1 if settings.get("strategy") == "mcts" else len(EXPECTED["prompts"])  # whose search takes long
    written = model.generate(EXPECTED["prompts"][:count], **settings)
    assert written == EXPECTED["results"][f"{name} fp32 {case}"][:count]


def test_log_probabilities_are_what_they_were(gpt: tuple[str, Generator]) -> None:
    name, model = gpt
    found = [token.logprob for token in model.logprobs("Before we proceed any further")[1:]]
    assert found == pytest.approx(EXPECTED["results"][f"{name} fp32 logprobs"], abs=2e-4)


@pytest.mark.slow
def test_a_run_of_then_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / "text.txt", "text.txt")
    shutil.copy(FIXTURES / "modern.ckpt", "old.ckpt")
    options = "--data.path tokens --data.source text.txt "
    options += "--trainer.max_steps 304 --trainer.val_check_interval 2 --trainer.check_val_every_n_epoch null "
    options += "--trainer.limit_val_batches 2 --samples.max_new_tokens 10 "
    options += "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.num_sanity_val_steps 0"
    assert main(["fit", "--ckpt_path", "old.ckpt", *options.split()]) == 0
    assert read_header(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt").step == 304
