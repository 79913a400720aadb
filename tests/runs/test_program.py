"""Two configurations trained with two seeds each, compared, and the better one frozen, as a user does it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environment import FIXTURES

from lit_gpt.__main__ import main
from lit_gpt.runs.record import read_run

SMALL = f"""
model:
  config: {{n_layer: 1, n_head: 2, n_embd: 32, block_size: 32}}
data: {{batch_size: 8, source: {FIXTURES / "text.txt"}, path: tokens, tokenizer: byte, val_split: "tail:0.2"}}
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 8
  val_check_interval: 4
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 4
  enable_progress_bar: false
samples: {{prompts: ["def "], max_new_tokens: 10}}
"""


@pytest.mark.slow
def test_train_compare_freeze_and_validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_GPT_FROZEN", raising=False)
    Path("small.yaml").write_text(SMALL)
    for lr in ("0.0001", "0.01"):
        for seed in ("1", "2"):
            argv = ["--seed_everything", seed, "--data.seed", seed, "--model.optimizer.lr", lr]
            assert main(["fit", "--config", "small.yaml", *argv]) == 0
    runs = [f"lightning_logs/version_{number}" for number in range(4)]
    record = read_run(Path(runs[0]))
    assert record.finished and [point.step for point in record.curve] == [4, 8]
    assert record.tokens == 8 * 8 * 32 and record.about["val_sha256"] and record.about["tokenizer"]
    assert record.curve[0].bits_per_byte is not None and record.seconds is not None and record.seconds > 0
    capsys.readouterr()
    text = ["--text", str(FIXTURES / "text.txt"), "--max_new_tokens", "8"]
    assert main(["compare", *runs, *text, "--format", "json", "--html", "page.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["runs"] for group in found["groups"]] == [["A1", "A2"], ["B1", "B2"]]
    assert set(found["differing"]) == {"seed_everything", "data.seed", "model.optimizer.lr"}
    assert found["differences"][0]["paired"] and found["differences"][0]["difference"] > 0
    assert any("2 seeds are few" in remark for remark in found["remarks"])
    assert {len(sample["texts"]) for sample in found["samples"]} == {2} and Path("page.html").is_file()
    assert main(["freeze", runs[2], "--name", "poet"]) == 0
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", "frozen:poet"]) == 0
    figures = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(figures["val/loss"]) == pytest.approx(min(p.loss for p in read_run(Path(runs[2])).curve), rel=1e-5)
