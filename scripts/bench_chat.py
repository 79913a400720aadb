"""Fine-tuning on conversations: how far the loss of answers falls, and how many answers end by themselves.

    lit_gpt fit --config configs/quickstart.yaml
    python scripts/bench_chat.py --init_from lightning_logs/version_0/checkpoints/last.ckpt

The checkpoint is fine-tuned by `lit_gpt fit --config configs/chat.yaml` in a process of its own, on conversations of
which a part is held out. Both losses are of the held-out answers: the one before belongs to the same weights with the
rows that the chat template's tokens get, after one step of no length. Then the tuned model answers held-out questions
that were asked in no conversation of the training, and an answer counts that ends with the token that ends a turn, and
not because it has become too long. Exits with 1 if fewer end than --ended_share, or the loss falls by less than
--loss_fall.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lit_gpt.api import load
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.generation.complete import complete
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.tokenizer.chat_template import ChatTemplate

ROOT = Path(__file__).resolve().parent.parent
WAYS: dict[str, dict[str, object]] = {
    "greedy": {"strategy": "greedy"},
    "sampled (temperature 0.8, top_k 50)": {"temperature": 0.8, "top_k": 50, "seed": 1},
}
NO_STEP = ("--trainer.max_steps", "1", "--model.optimizer.lr", "0", "--model.optimizer.muon_lr", "0")


def main() -> None:
    """Fine-tune, judge, print, write JSON."""
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "data"
    before, _ = fit(options, "before", data, NO_STEP)
    after, seconds = fit(options, "after", data, options.extra)
    losses = [validation_loss(checkpoint, data) for checkpoint in (before, after)]
    fall = 1 - losses[1] / losses[0]
    print(f"loss of held-out answers: {losses[0]:.4f} before, {losses[1]:.4f} after {seconds:.1f} s: {fall:.1%} less")
    shares = ended_shares(after, data, options)
    for name, share in shares.items():
        print(f"{name}: {share:.1%} of the answers end with the end token")
    result = {"before": losses[0], "after": losses[1], "fall": fall, "seconds": seconds, "ended": shares}
    (options.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    if fall < options.loss_fall or min(shares.values()) < options.ended_share:
        sys.exit(f"not reached: {options.loss_fall:.1%} less loss and {options.ended_share:.1%} ended answers")


def parse_options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--init_from", required=True, help="the checkpoint to fine-tune")
    parser.add_argument("--config", default=str(ROOT / "configs" / "chat.yaml"))
    parser.add_argument("--source", default="stdlib-chat", help="the conversations")
    parser.add_argument("--val_split", default="hash:0.05", help="the share that is held out")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions to answer")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="an answer that is longer has not ended")
    parser.add_argument("--ended_share", type=float, default=0.95)
    parser.add_argument("--loss_fall", type=float, default=1 / 3)
    parser.add_argument("--output", type=Path, default=Path("bench_chat"), help="folder for data, runs and results")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="the rest goes to `lit_gpt fit`")
    return parser.parse_args()


def fit(options: argparse.Namespace, name: str, data: Path, extra: tuple[str, ...]) -> tuple[str, float]:
    """(checkpoint, seconds in all) of one run."""
    root = options.output / f"{name}_{time.time_ns()}"
    words = [
        "fit", "--config", options.config, "--init_from", options.init_from,
        "--data.source", options.source, "--data.path", str(data), "--data.val_split", options.val_split,
        "--samples.prompts", "[]", "--samples.held_out", "0", "--samples.print_at_end", "0",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(root), *extra,
    ]  # fmt: skip
    start = time.perf_counter()
    said = program(words).stderr
    seconds = time.perf_counter() - start
    print("\n".join(line for line in said.splitlines() if "conversations" in line), flush=True)
    return str(next(root.rglob("last.ckpt"))), seconds


def validation_loss(checkpoint: str, data: Path) -> float:
    """The loss of the held-out answers, in nats a token."""
    words = ["validate", "--ckpt_path", checkpoint, "--data.path", str(data), "--trainer.enable_progress_bar", "false"]
    found = re.search(r"val/loss ([\d.]+)", program(words).stdout)
    assert found is not None
    return float(found[1])


def program(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `lit_gpt` on this checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "lit_gpt", *words], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"lit_gpt {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    return done


def ended_shares(checkpoint: str, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """For each way of decoding the share of held-out questions whose answer ends with the token that ends a turn."""
    gpt = load(checkpoint)
    assert gpt.tokenizer is not None
    questions = held_out_questions(data, gpt.config.block_size, options.questions)
    template = ChatTemplate(gpt.tokenizer)
    end_ids = template.end_ids
    template.close()
    shares = {}
    for name, way in WAYS.items():
        settings = {"max_new_tokens": options.max_new_tokens, "stop_token_ids": list(end_ids), "overflow": "stop"}
        config = GenerationConfig(**settings, **way)  # type: ignore[arg-type]
        engine = Engine(gpt.model, gpt.config, gpt.tokenizer, device=gpt.device)
        answers = dict(complete(engine, questions, config))
        ended = [bool(made.ids) and made.ids[-1] in end_ids for (made,) in answers.values()]
        shares[name] = sum(ended) / len(questions)
        for index in range(3):
            print(f"--- {gpt.tokenizer.decode(questions[index])}{answers[index][0].text}\n")
    return shares


def held_out_questions(data: Path, block_size: int, count: int) -> list[list[int]]:
    """The first questions of held-out conversations, as ids; none of them begins a conversation of the training."""
    module = TokenDataModule(str(data), format="chat", block_size=block_size)
    module.setup("fit")
    asked = {tuple(ids.tolist()) for ids in module._open_rows("train").prompts(sys.maxsize)}
    questions = module.example_prompts(count)
    seen = sum(tuple(ids) in asked for ids in questions)
    print(f"{len(questions)} held-out questions; {seen} of them were asked in the training", flush=True)
    return [ids for ids in questions if tuple(ids) not in asked]


if __name__ == "__main__":
    main()
