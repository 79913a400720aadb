"""What several sections work on: a training run of seconds, a tiny model in both formats, prompts."""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from torture_sections.children import Ended, Work, program, run, value_of
from torture_sections.faults import Fault
from torture_sections.section import check

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "tests/fixtures/text.txt"

STEPS, SHORT_STEPS = 60, 15
SETTINGS = """
model:
  preset: nano
  config: {{n_layer: 1, n_head: 2, n_embd: 16, block_size: 16, dropout: 0.2}}
  optimizer: {{name: muon, lr: 0.01}}
  schedule: {{name: cosine, warmup: 4}}
  compile: false
data: {{batch_size: 4, path: {tokens}}}
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: {steps}
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  val_check_interval: 10  # micro-batches: after every fifth step
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  limit_val_batches: 3
  log_every_n_steps: 5
  enable_progress_bar: false
samples: {{prompts: []}}
"""
"""Dropout, accumulation, two optimizers in one, a schedule: whatever a resumed run could get wrong."""


class TinyFit:
    """A training run of some seconds, its final bits when nothing disturbs it, and how to run it again.

    Attributes:
        steps: that it has.
        begun: a folder in which it was killed after a third of its steps.
        seconds: that it takes undisturbed.
    """

    def __init__(self, root: Path, steps: int) -> None:
        self.folder, self.steps = root / "fit-materials", steps
        self.folder.mkdir()
        words = ("prepare", TEXT, "--output", "tokens", "--tokenizer", "byte", "--val_split", "tail:0.1")
        ended = run(self.folder, program(*words))
        check(ended.status == 0, f"the text could not be prepared: {ended}")
        self.tokens = self.folder / "tokens"
        self.settings = self.folder / "settings.yaml"
        self.settings.write_text(SETTINGS.format(tokens=self.tokens, steps=steps))
        whole = self.folder / "whole"
        whole.mkdir()
        ended = run(whole, self.work(whole))
        check(ended.status == 0, f"the undisturbed run failed: {ended}")
        self.seconds = ended.seconds
        self.expected = final_bits(checkpoints(whole)[0].parent)
        self.begun = self.folder / "begun"
        self.begun.mkdir()
        ended = run(self.begun, Fault("training step", 2 * steps // 3 + 1).within(self.work(self.begun)))
        check(ended.status == -9, f"the run that was to be killed was not: {ended}")

    def work(self, folder: Path) -> Work:
        """Begin the run in `folder`, or go on with it."""
        resumed = ["--ckpt_path", "last"] if checkpoints(folder) else []
        return program("fit", "--config", self.settings, *resumed)

    def copy_of_begun(self, folder: Path) -> None:
        """The run that was killed, with its files' times, in a new or an empty folder."""
        shutil.copytree(self.begun, folder, dirs_exist_ok=True)

    def check_whole(self, folder: Path) -> None:
        """Compare the newest run of a folder, which is finished, with the undisturbed one. Raises Wrong."""
        check(checkpoints(folder), "the run has left no checkpoint")
        self.check_checkpoints(max(checkpoints(folder), key=lambda path: path.stat().st_mtime_ns).parent)

    def check_checkpoints(self, folder: Path) -> None:
        """Compare a folder of checkpoints with the undisturbed run's. Raises Wrong."""
        found = final_bits(folder)
        differ = [name for name, digest in self.expected.items() if found.get(name) != digest]
        check(not differ, f"the finished run differs from the undisturbed one in {', '.join(differ)}")
        left = [path.name for part in (folder, folder.parent) for path in part.iterdir() if path.name.startswith(".")]
        check(not left, f"left behind: {', '.join(left)}")


@cache
def tiny_fit(root: Path, short: bool) -> TinyFit:
    """The run that all sections share."""
    return TinyFit(root, SHORT_STEPS if short else STEPS)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints `last` of the runs in a folder."""
    return sorted((folder / "lightning_logs").glob("version_*/checkpoints/last.ckpt"))


def check_readable(folder: Path) -> None:
    """Read every checkpoint in a folder: it is whole, and its weights are numbers. Raises Wrong."""
    paths = sorted(folder.rglob("*.ckpt"))

    def read() -> list[str]:
        from lit_gpt.checkpoint.format import load_model

        return [path.name for path in paths if not all(p.isfinite().all() for p in load_model(path)[0].parameters())]

    check(not value_of(read), "a checkpoint has weights that are no numbers")


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", "TokenDataModule")
"""Of a checkpoint: what training depends on."""


def final_bits(folder: Path) -> dict[str, str]:
    """Hashes of the parts of a folder's two checkpoints. Raises Wrong if one cannot be read."""

    def read() -> dict[str, str]:
        from lit_gpt.checkpoint.format import load_checkpoint

        last, best = (load_checkpoint(folder / name) for name in ("last.ckpt", "best.ckpt"))
        return {name: _digest(last[name]) for name in PARTS} | {"best.ckpt": _digest(best["state_dict"])}

    return value_of(read)


def _digest(value: Any) -> str:
    """A hash of nested plain values and tensors: of their bits, and not of the order of keys."""
    import torch

    content = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            content.update(f"{item.dtype} {tuple(item.shape)}".encode())
            content.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                content.update(f"key {key}".encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            content.update(f"list {len(item)}".encode())
            for part in item:
                add(part)
        else:
            content.update(repr(item).encode())

    add(value)
    return content.hexdigest()


class TinyModel:
    """A random model with a trained tokenizer: as our checkpoint, and as a Hugging Face folder of several shards.

    Attributes:
        checkpoint: ours.
        hf: the folder.
        prompts: a file with many of them.
        predicted: what `predict` writes for those when nothing disturbs it.
    """

    PROMPTS = 40

    def __init__(self, root: Path) -> None:
        self.folder = root / "model-materials"
        self.folder.mkdir()
        self.checkpoint, self.hf = self.folder / "tiny.ckpt", self.folder / "hf"
        self.prompts, self.predicted = self.folder / "prompts.txt", self.folder / "whole.jsonl"
        self.prompts.write_text("".join(f"{number} {'to be ' * (number % 4)}or\n" for number in range(self.PROMPTS)))
        words = ("prepare", TEXT, "--output", "tokens", "--tokenizer", "bpe:300", "--val_split", "tail:0.1")
        for work in (program(*words), self._make, self.to_hf("hf"), self.predict("whole.jsonl")):
            ended = run(self.folder, work)
            check(ended.status == 0, f"the model could not be made: {ended}")

    def _make(self) -> None:
        import torch

        from lit_gpt.checkpoint.format import save_model
        from lit_gpt.model.config import GPTConfig
        from lit_gpt.model.gpt import GPT
        from lit_gpt.tokenizer.tokenizer import Tokenizer

        torch.manual_seed(0)
        tokenizer = Tokenizer.load("tokens")
        shape = {"block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "mlp": "gelu_tanh", "init_std": 0.2}
        config = GPTConfig(vocab_size=tokenizer.n_vocab, **shape)  # type: ignore[arg-type]
        save_model(self.checkpoint, GPT(config), tokenizer)

    def to_hf(self, output: str) -> Work:
        """Convert our checkpoint, into shards of 20 kB."""

        def work() -> int | None:
            from lit_gpt.convert import write

            write.SHARD_BYTES = 20_000
            return program("convert", self.checkpoint, output, "--to", "hf")()

        return work

    def from_hf(self, output: str, source: Path | str = "") -> Work:
        """Convert the folder, or another one."""
        return program("convert", source or self.hf, output)

    def predict(self, output: str) -> Work:
        """Continue the prompts, eight at a time; go on with what is there."""

        def work() -> int | None:
            from lit_gpt.cli import predict

            predict._BATCH = 8
            words = ["--ckpt_path", self.checkpoint, "--prompts", self.prompts, "--output", output, "--resume"]
            options = ["--max_new_tokens", 6, "--temperature", 0.8, "--seed", 3, "--precision", "fp32"]
            return program("predict", *words, *options, "--trainer.accelerator", "cpu")()

        return work

    def check_predicted(self, path: Path) -> None:
        """Compare a finished output with the undisturbed one. Raises Wrong."""
        found, expected = (file.read_text("utf-8").splitlines() for file in (path, self.predicted))
        check(len(found) == len(expected), f"{len(found)} results, not {len(expected)}")
        differ = [number for number, lines in enumerate(zip(found, expected)) if lines[0] != lines[1]]
        check(not differ, f"the results of prompts {differ[:5]} differ from the undisturbed run's")
        left = [name.name for name in path.parent.iterdir() if name.name.startswith(f"{path.name}.partial")]
        check(not left, f"left behind: {', '.join(left)}")


@cache
def tiny_model(root: Path) -> TinyModel:
    """The model that all sections share."""
    return TinyModel(root)


def must_end(ended: Ended, *statuses: int) -> None:
    """Raise Wrong unless the status is one of these and there is no traceback."""
    check(ended.status in statuses, f"ended with {ended}; expected {' or '.join(map(str, statuses))}")
    check("Traceback" not in ended.err, f"a traceback: {ended.last_line[:300]}")
