"""The tutorial's commands, as they stand in both languages, on a small text and a small model."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from environment import ROOT
from fork_server import ForkServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt.__main__ import main

DOCS = ROOT / "docs"
SMALL = (
    "--model.config.n_layer 1 --model.config.n_head 2 --model.config.n_embd 32 --model.config.block_size 32 "
    "--data.tokenizer bpe:300 --data.batch_size 4 --trainer.max_steps 4 --trainer.val_check_interval 2 "
    "--trainer.precision 32-true "
    "--samples.max_new_tokens 4 --samples.print_at_end 1 --remix true"
)


def commands(path: Path) -> list[str]:
    """What follows `$ ` in the blocks of console output."""
    blocks = re.findall(r"^```console\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_both_languages_give_the_same_commands() -> None:
    english = commands(DOCS / "tutorial.md")
    assert english == commands(DOCS / "tutorial.zh.md")
    assert {line.split()[1] for line in english if line.startswith("lit_gpt")} >= {
        "tokenize", "prepare", "info", "fit", "predict", "remix", "serve",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tutorial.md", "tutorial.zh.md"])
def test_links_and_pictures_are_there(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert sum(target.endswith(".png") for target in targets) >= 3
    for target in targets:
        assert (DOCS / target).exists(), target


def small_command(line: str) -> list[str]:
    """The words after `lit_gpt`, with numbers turned down and nothing to download."""
    words = shlex.split(line)[1:]
    for flag, value in (("--max_new_tokens", "6"), ("--num_samples", "2"), ("--port", "0")):
        if flag in words:
            words[words.index(flag) + 1] = value
    words = ["byte" if word == "cl100k_base" else word for word in words]
    if words[0] == "fit":
        words += [*shlex.split(SMALL), "--data.source", "texts"]
    return words


def serve_and_ask(words: list[str], folder: Path, fork_server: ForkServer) -> None:
    """Start the server as the tutorial does and send its request."""
    process = fork_server.start("-m", "lit_gpt", *words, cwd=folder)
    try:
        log = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log)):
            assert process.wait(0.05) is None, log
            with contextlib.suppress(FileNotFoundError):  # it has not begun to write
                log = "".join(process.output())
        (curl,) = [line for line in commands(DOCS / "tutorial.md") if line.startswith("curl")]
        body = shlex.split(curl)[-1].encode()
        request = urllib.request.Request(f"{found[0]}/v1/completions", body, {"Content-Type": "application/json"})
        for _ in range(1200):  # it says where it will listen before it does
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert json.load(answer)["choices"]
                return
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:
                time.sleep(0.05)
        raise AssertionError("the server does not answer")
    finally:
        process.kill()
        process.finish()


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fork_server: ForkServer
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(DOCS / "tutorial", tmp_path / "docs" / "tutorial")
    (tmp_path / "texts").mkdir()
    for name in ("tokenizer/printable", "insight/remix/novelty", "generation/trace"):
        shutil.copy(ROOT / "lit_gpt" / f"{name}.py", tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for line in commands(DOCS / "tutorial.md"):
        if line.startswith("lit_gpt serve"):
            serve_and_ask(small_command(line), tmp_path, fork_server)
        elif line.startswith("lit_gpt"):
            assert main(small_command(line)) == 0, f"{line}: {capfd.readouterr().err}"
        else:
            assert line.startswith(("curl", "tensorboard")), line
    events = EventAccumulator(str(next(tmp_path.glob("lightning_logs/version_*"))))
    events.Reload()
    assert {"remix/longest", "remix/new_4_grams", "remix/held_out_new_4_grams"} <= set(events.Tags()["scalars"])
