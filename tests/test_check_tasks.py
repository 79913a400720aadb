"""`scripts/check_tasks.py`: what is the same is called so, and what differs is noticed. The harness is a stub here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from environment import FIXTURES, ROOT
from fork_server import ForkServer

from lit_gpt.__main__ import main

STUB = '''
import json
from pathlib import Path

__version__ = "stub"


def simple_evaluate(model, model_args, tasks, **options):
    """The figures in a file, by the harness' names; the tasks and the exported model are there."""
    assert Path(model_args["pretrained"], "config.json").is_file() and model_args["dtype"] == "float64"
    kinds = [task["task"].removeprefix("lit_gpt_") for task in tasks]
    assert all(Path(task["dataset_kwargs"]["data_files"]["test"]).is_file() for task in tasks)
    figures = json.loads(Path("figures.json").read_text())
    return {"results": {
        f"lit_gpt_{kind}": {"alias": kind} | {
            f"{name.partition('/')[2]},none": value for name, value in figures.items() if name.startswith(kind)
        } for kind in kinds
    }}
'''


@pytest.mark.slow
def test_what_differs_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fork_server: ForkServer
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        {"query": "First", "choices": ["Citizen", "Senator"], "gold": 0},
        {"query": "Speak", "choices": ["speak", "hear"], "gold": 1},
        {"context": "All:\nResolved.", "continuation": " resolved"},
    ]
    Path("tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ckpt = str(FIXTURES / "gpt2.ckpt")
    words = ["--trainer.precision", "64-true", "--trainer.accelerator", "cpu"]
    assert main(["validate", "--ckpt_path", ckpt, "--tasks", "tasks.jsonl", *words]) == 0
    pairs = [line.removeprefix("val/").split() for line in capsys.readouterr().out.splitlines()]
    figures = {name: float(value) for name, value in pairs}
    figures["cloze/perplexity"] *= 1 + 1e-5
    Path("figures.json").write_text(json.dumps(figures))
    Path("lm_eval/tasks").mkdir(parents=True)
    Path("lm_eval/__init__.py").write_text(STUB)
    Path("lm_eval/tasks/__init__.py").write_text("class TaskManager: pass\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = fork_server.run(ROOT / "scripts/check_tasks.py", ckpt, "tasks.jsonl", env=env)
    assert done.returncode == 1, done.stderr
    marked = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("  differs")]
    assert marked == ["cloze/perplexity"] and "1 figures differ" in done.stdout
    assert "multiple_choice/acc_bytes" in done.stdout
