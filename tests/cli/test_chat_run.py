"""Fine-tuning on conversations through the program: from a base model to one for chat, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chatting import as_openai, some_conversations, write_lines
from environment import RunProgram

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import read_header
from lit_gpt.data.prepare import prepare
from lit_gpt.tokenizer.tokenizer import Tokenizer

TRAINER = """
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 6
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  enable_progress_bar: false
"""
BASE = f"""
model:
  config: {{n_layer: 1, n_head: 2, n_embd: 16, block_size: 128, position: rope}}
data: {{batch_size: 4, source: text.txt, path: tokens, tokenizer: byte, val_split: "tail:0.1"}}
samples: {{prompts: []}}
{TRAINER}
"""
CHAT = f"""
data: {{batch_size: 2, source: c.jsonl, path: chat, format: chat, val_split: "hash:0.2"}}
samples: {{prompts: ["What is a fox?"], max_new_tokens: 5, print_at_end: 1}}
{TRAINER}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. 狐狸\n" * 200, "utf-8")
    write_lines(Path("c.jsonl"), map(as_openai, some_conversations(40, most_turns=1)))
    Path("base.yaml").write_text(BASE)
    Path("chat.yaml").write_text(CHAT)
    return tmp_path


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("lit_gpt", "error"))]
    return lines[-1]


@pytest.mark.slow
def test_from_a_base_model_to_one_that_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "base.yaml"]) == 0
    base = "lightning_logs/version_0/checkpoints/last.ckpt"
    assert main(["fit", "--config", "chat.yaml", "--init_from", base]) == 0
    printed = capsys.readouterr()
    assert "--- sample 1 ---\nWhat is a fox?" in printed.out
    assert "conversations of" in printed.err and "% padding" in printed.err
    chat = "lightning_logs/version_1/checkpoints/last.ckpt"
    entry = torch.load(chat, weights_only=True)["lit_gpt"]
    tokenizer = Tokenizer.from_dict(entry["tokenizer"])
    assert tokenizer.chat_template is not None and "<|im_end|>" in tokenizer.specials
    assert read_header(chat).config.vocab_size == 259
    assert entry["validation"]["step"] == 6 and 0 <= entry["validation"]["first_token_accuracy"] <= 1

    # The checkpoint knows its data: validated again it says the same, and a run goes on.
    assert main(["validate", "--ckpt_path", chat]) == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(found["val/loss"]) == pytest.approx(entry["validation"]["loss"], rel=1e-5)
    assert float(found["val/counted_tokens"]) == entry["validation"]["counted_tokens"]
    assert main(["fit", "--config", "chat.yaml", "--ckpt_path", chat, "--trainer.max_steps", "8"]) == 0
    capsys.readouterr()

    # Edited conversations are not trained on as they were before.
    write_lines(folder / "c.jsonl", map(as_openai, some_conversations(39, most_turns=1)))
    assert main(["fit", "--config", "chat.yaml", "--init_from", base]) == 2
    assert "or of what it was before it was changed: name another --data.path" in only_line(capsys)
    more = ["--data.source", "null", "--trainer.max_steps", "1"]
    assert main(["fit", "--config", "chat.yaml", "--init_from", base, *more]) == 0


REFUSED = {
    "a folder of text": (["--data.path", "tokens", "--data.source", "text.txt"], "holds shards of format text, not"),
    "no conversations": (["--data.source", "stdlib"], "stdlib is text, not conversations"),
    "another format's": (["--data.source", "stdlib-chat", "--data.format", "text"], "stdlib-chat is made for format"),
    "a bad line": (["--data.source", "bad.jsonl"], "bad.jsonl: line 1: message 1 has no role"),
    "across in text": (["--data.format", "text", "--data.attend_across", "true"], "attend_across is for conversations"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(name: str, folder: Path, program: RunProgram) -> None:
    words, says = REFUSED[name]
    write_lines(Path("bad.jsonl"), [{"messages": [{"content": "a"}]}])
    if "tokens" in words:
        prepare("text.txt", "tokens", "byte")
    shape = ["--data.tokenizer", "byte", "--model.preset", "nano"]
    done = program("fit", "--config", "chat.yaml", *shape, *words)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert says in done.stderr.splitlines()[-1], done.stderr
    assert not Path("chat").exists() and not Path("lightning_logs").exists()
