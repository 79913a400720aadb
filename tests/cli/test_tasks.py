"""`lit_gpt validate --tasks` as a user runs it: figures on stdout, ranks, and bad input before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environment import FIXTURES
from fork_server import ForkServer

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import save_model
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

QUESTIONS = [
    {"query": "First", "choices": ["Citizen", "Senator", "day"], "gold": 0},
    {"query": "Speak, ", "choices": ["speak", "hear"], "gold": 0, "target_delimiter": ""},
    {"query": "", "choices": ["All:", "春"], "gold": 1},
    {"context": "First Citizen:\nBefore we proceed any further, hear me", "continuation": " speak"},
    {"context": "春眠不觉", "continuation": "晓"},
    {"context": "All:\n" * 100, "continuation": "Speak"},
]
VALIDATE = ["validate", "--ckpt_path", str(FIXTURES / "gpt2.ckpt"), "--trainer.accelerator", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "absent.jsonl"], "--tasks absent.jsonl: no such file"),
        (["--tasks", "bad.jsonl"], 'bad.jsonl: line 2: "gold" is 7, not the number of one of its 2 choices'),
        (["--tasks", "tasks.jsonl", "--trainer.limit_val_batches", "2"], "trainer.limit_val_batches=2"),
        (["--tasks", "tasks.jsonl", "--trainer.fast_dev_run", "true"], "trainer.fast_dev_run=True: --tasks scores"),
        (["--tasks", "long.jsonl"], "long.jsonl: line 1: the continuation has"),
        (["--tasks", "tasks.jsonl", "--ckpt_path", "bare.ckpt"], "this model came without a tokenizer"),
    ],
    ids=lambda value: " ".join(value)[8:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_any_work(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"query": "a", "choices": ["b", "c"], "gold": 7}
    (folder / "bad.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(bad) + "\n")
    (folder / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": " speak" * 500}) + "\n")
    save_model("bare.ckpt", GPT(GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=8)), None)
    before = sorted(folder.iterdir())
    assert main([*VALIDATE, *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and sorted(folder.iterdir()) == before
    (line,) = (line for line in printed.err.splitlines() if line.startswith("lit_gpt: error:"))  # not Lightning's
    assert line.startswith("lit_gpt: error: ") and message in line


@pytest.mark.slow
def test_the_figures_of_one_rank_and_of_two(
    folder: Path, capsys: pytest.CaptureFixture[str], fork_server: ForkServer
) -> None:
    assert main([*VALIDATE, "--tasks", "tasks.jsonl"]) == 0
    one = capsys.readouterr()
    names = [line.split()[0] for line in one.out.splitlines()]
    of_choices = [f"val/multiple_choice/{name}" for name in ("acc", "acc_norm", "acc_bytes")]
    of_cloze = [f"val/cloze/{name}" for name in ("acc", "log_likelihood")]
    with_errors = [f"{name}{end}" for name in (*of_choices, *of_cloze) for end in ("", "_stderr")]
    assert sorted(names) == sorted([*with_errors, "val/cloze/perplexity"])
    assert "tasks.jsonl: 3 questions with choices, 3 cloze texts, 10 continuations to score" in one.err
    assert "1 are longer than the context of" in one.err
    assert not Path("lightning_logs").exists()
    words = ["-m", "lit_gpt", *VALIDATE, "--tasks", "tasks.jsonl", "--trainer.devices", "2", "--data.batch_size", "6"]
    first, second = fork_server.run_ranks(2, *words, cwd=folder)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    two = {line.split()[0]: float(line.split()[1]) for line in first.stdout.splitlines()}
    assert two == pytest.approx({line.split()[0]: float(line.split()[1]) for line in one.out.splitlines()}, rel=1e-5)
    assert second.stdout == "" and "questions with choices" not in second.stderr
