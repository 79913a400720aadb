"""Recipes for a text of one's own at equal time: bits per byte of its last tenth.

    python scripts/bench_own_text.py --texts my_book.txt --configs configs/quickstart.yaml configs/own_text.yaml

Every text is trained on with every configuration in turn, for the same time and with no other limit of steps, and held
out is its last tenth. Printed are the bits per byte of the last checkpoint and of the best one: where they are the same
the loss did not rise at the end.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from bench_learning import program


def main() -> None:
    """Run all, print a line of Markdown for each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files of text")
    parser.add_argument("--configs", type=Path, nargs="+", required=True, help="configurations of `lit_gpt fit`")
    parser.add_argument("--max_time", default="00:00:02:45", help="of each run, DD:HH:MM:SS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=Path("bench_own_text"), help="folder for runs")
    options = parser.parse_args()
    print("| text | configuration | seed | bits per byte | of the best checkpoint | run |\n|---|---|---|---|---|---|")
    for seed in options.seeds:
        for text in options.texts:
            for config in options.configs:
                last, best, run = bits_per_byte(text, config, seed, options)
                print(f"| {text.name} | {config.name} | {seed} | {last:.4f} | {best:.4f} | {run} |", flush=True)


def bits_per_byte(text: Path, config: Path, seed: int, options: argparse.Namespace) -> tuple[float, float, str]:
    """(of the last checkpoint, of the best one, steps and seconds)."""
    root = options.output / f"{text.stem}_{config.stem}_{seed}_{time.time_ns()}"
    data = ["--data.path", str(root / "tokens")]
    fit = ["fit", "--config", str(config), *data, "--data.source", str(text), "--data.val_split", "tail:0.1"]
    fit += ["--trainer.max_time", options.max_time, "--trainer.max_steps", "-1", "--samples.prompts", "[]"]
    fit += ["--trainer.enable_progress_bar", "false", "--seed_everything", str(seed), "--data.seed", str(seed)]
    said = program([*fit, "--trainer.default_root_dir", str(root)]).stderr
    print(*re.findall(r"preset auto: .*", said), file=sys.stderr, flush=True)
    figures = []
    for name in ("last", "best"):
        checkpoint = next(root.rglob(f"{name}.ckpt"))
        found = re.search(r"val/bits_per_byte ([\d.]+)", program(["validate", "--ckpt_path", str(checkpoint)]).stdout)
        assert found is not None
        figures.append(float(found[1]))
    run = re.search(r"[\d,]+ steps, [\d,]+ tokens in [\d.]+ s", said)
    assert run is not None, said
    return figures[0], figures[1], run[0]


if __name__ == "__main__":
    main()
