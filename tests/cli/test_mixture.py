"""`fit` on a mixture of folders in rows of documents, as a user runs it: resumed without flags, and bad input."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import load_checkpoint
from lit_gpt.data.prepare import prepare

FIT = "fit --data.path a --data.mixture '{a: 3, b: 1}' --data.rows documents --data.batch_size 4"
FIT += " --model.config.block_size 32 --model.config.n_layer 1 --model.config.n_head 2 --model.config.n_embd 16"
FIT += " --trainer.max_steps 3 --trainer.accelerator cpu --trainer.precision 32-true --model.compile false"
FIT += (
    " --samples.prompts [] --samples.print_at_end 0 --trainer.enable_progress_bar false --trainer.limit_val_batches 1"
)
LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in (("a", "the quick brown fox\n"), ("b", "春眠不觉晓\n")):
        for number in range(30):
            (tmp_path / f"{name}{number}.txt").write_text(f"{number} {text * (number % 5 + 1)}", "utf-8")
        prepare(str(tmp_path / f"{name}*.txt"), tmp_path / name, "byte", val_split="hash:0.2", workers=1)
    return tmp_path


@pytest.mark.slow
def test_fit_and_resume_without_a_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(FIT)) == 0
    said = capsys.readouterr().err
    assert "a, train: " in said and "b, train: " in said
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5", "--trainer.accelerator", "cpu"]) == 0
    state = load_checkpoint(LAST)["TokenDataModule"]
    assert (state["epoch"], state["position"], state["rows"], state["mixture"]) == (0, 20, "documents", "3:1")
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6", "--data.rows", "stream"]) == 2
    assert "data.rows gives rows stream, the run's is documents" in capsys.readouterr().err


@pytest.mark.slow
def test_bad_input_is_one_line_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(str(folder / "b*.txt"), folder / "other", "char", workers=1)
    for line, message in [
        (FIT.replace("b:", "gone:"), "gone: no such folder"),
        (FIT.replace("b: 1", "b: -1"), "b has weight -1"),
        (FIT.replace("b:", "other:"), "data.mixture: other holds shards of the tokenizer char"),
        (FIT.replace("documents", "rows"), "rows"),
        (f"{FIT} --remix true", "--remix compares samples with the text of data.path, not with data.mixture"),
    ]:
        capsys.readouterr()
        assert main(shlex.split(line)) == 2, line
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("lit_gpt: error: ") and message in last
    assert not Path("lightning_logs").exists()
