"""`lit_gpt validate --tasks` beside lm-evaluation-harness on the same model and file. Exits with 1 if figures differ.

python scripts/check_tasks.py CHECKPOINT tasks.jsonl [--precision 32-true]

It needs lm_eval, which brings some 30 packages and is therefore in no extra: pip install 'lm_eval==0.4.13'. The
checkpoint is written as a Hugging Face folder and the file as two tasks of the harness, whose settings for multiple
choice and for log-likelihood are its defaults, but for the delimiter of cloze texts, which have none. All lines with
choices must have the same "target_delimiter". A tokenizer with a token that begins every text needs the harness'
`add_bos_token`, which is set then.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import lit_gpt.__main__
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.write import write_hf
from lit_gpt.data.tasks import DELIMITER

MARGIN = 1e-6
"""By which a figure may differ, as a share of it where it is above 1."""
PREFIX = "lit_gpt_"
"""Of the names of the tasks, which the harness must not have already."""
DTYPES = {"64-true": "float64", "32-true": "float32"}


def figures_here(checkpoint: str, tasks: str, precision: str) -> dict[str, float]:
    """What the program prints: name → value, without the stage."""
    words = ["validate", "--ckpt_path", checkpoint, "--tasks", tasks]
    words += ["--trainer.precision", precision, "--trainer.accelerator", "cpu"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = lit_gpt.__main__.main(words)
    if status:
        sys.exit(status)  # it has said why
    pairs = (line.split() for line in printed.getvalue().splitlines())
    return {name.removeprefix("val/"): float(value) for name, value in pairs}


def task_of(kind: str, lines: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The lines of one kind as a task of the harness, whose file is written to `folder`."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    task: dict[str, Any] = {
        "task": PREFIX + kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    if kind == "cloze":
        metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
        parts = {"doc_to_text": "context", "doc_to_target": "continuation", "target_delimiter": ""}
        return {**task, **parts, "output_type": "loglikelihood", "metric_list": metrics}
    (delimiter,) = {line.get("target_delimiter", DELIMITER) for line in lines}
    parts = {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": delimiter}
    metrics = [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")]
    return {**task, **parts, "output_type": "multiple_choice", "metric_list": metrics}


def figures_there(checkpoint: str, tasks: Path, dtype: str) -> dict[str, float]:
    """The harness' figures by our names."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    lines = [json.loads(line) for line in tasks.read_text("utf-8").splitlines() if line.strip()]
    kinds = {
        "multiple_choice": [line for line in lines if "choices" in line],
        "cloze": [line for line in lines if "choices" not in line],
    }
    source = open_source(checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf(source, folder / "model")
        bos = source.tokenizer is not None and source.tokenizer.bos_id is not None
        results = lm_eval.simple_evaluate(
            "hf",
            model_args={"pretrained": str(folder / "model"), "dtype": dtype, "add_bos_token": bos},
            tasks=[task_of(kind, some, folder) for kind, some in kinds.items() if some],
            device="cpu",
            batch_size=4,
            bootstrap_iters=2,  # of the error of the perplexity, which is not compared
            task_manager=TaskManager(),
        )["results"]
    figures = {}
    for kind, found in results.items():
        for name, value in found.items():
            metric, _, _ = name.partition(",")  # what follows is a filter
            if isinstance(value, float):
                figures[f"{kind.removeprefix(PREFIX)}/{metric}"] = value
    return figures


def main() -> int:
    """Compare; 0 if all is well, 1 if not, 2 for what cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--precision", choices=DTYPES, default="64-true", help="that both compute in")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import lm_eval
    except ImportError:
        print("lm_eval is not installed: pip install 'lm_eval==0.4.13'", file=sys.stderr)
        return 2
    print(f"lm_eval {lm_eval.__version__}, {options.precision}")
    here = figures_here(options.checkpoint, str(options.tasks), options.precision)
    there = figures_there(options.checkpoint, options.tasks, DTYPES[options.precision])
    differ = 0
    for name in sorted(here.keys() & there.keys()):
        wrong = abs(here[name] - there[name]) > MARGIN * max(1.0, abs(there[name]))
        differ += wrong
        print(f"{name:<34}{here[name]:>14.6f}{there[name]:>14.6f}{'  differs' if wrong else ''}")
    compared = here.keys() & there.keys()
    if not {f"{kind}/acc" for kind in ("multiple_choice", "cloze") if f"{kind}/acc" in here} <= compared:
        print(f"the harness gave {sorted(there)}: nothing can be compared", file=sys.stderr)
        return 2
    print(f"{differ} figures differ" if differ else "all figures are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
