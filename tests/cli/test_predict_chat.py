"""`lit_gpt predict --chat`: each prompt is what a user says, and the answer ends with the assistant's turn."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gpt

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.checkpoint.format import save_model
from lit_gpt.tokenizer.chat_template import ChatTemplate, Message, with_chat_template
from lit_gpt.tokenizer.tokenizer import get_tokenizer

CHAT = with_chat_template(get_tokenizer("byte"))
END = CHAT.specials["<|im_end|>"]
FLAGS = ["--max_new_tokens", "12", "--seed", "3", "--trainer.accelerator", "cpu"]
USERS_ONLY = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
USERS_ONLY += "{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model for chat that ends its turns soon, one with a template for users only, and one without any."""
    made = tmp_path_factory.mktemp("chat")
    model = tiny_gpt(std=0.2, dtype=torch.float32, vocab_size=259, block_size=96, tie_embeddings=False, head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[END] = 5.0
    save_model(made / "chat.ckpt", model, CHAT)
    save_model(made / "users.ckpt", model, replace(CHAT, chat_template=USERS_ONLY))
    save_model(made / "plain.ckpt", tiny_gpt(dtype=torch.float32), get_tokenizer("byte"))
    save_model(made / "bare.ckpt", tiny_gpt(dtype=torch.float32), None)
    return made


@pytest.fixture
def inside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """`lit_gpt predict --ckpt_path NAME` in this process."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = main(["predict", "--ckpt_path", str(folder / name), *FLAGS, *words])
        captured = capfd.readouterr()
        return subprocess.CompletedProcess([], status, captured.out, captured.err)

    return run


def read(path: str) -> list[dict[str, Any]]:
    return sorted(map(json.loads, Path(path).read_text("utf-8").splitlines()), key=lambda record: record["index"])


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "Be <|im_end|> kind"])
def test_answers_end_with_the_turn(system: str | None, folder: Path, inside: Any) -> None:
    Path("questions.txt").write_text("你好\nWhat <|im_start|>is it?\nHi\n", "utf-8")
    words = ["--prompts", "questions.txt", "--start", "two\nlines", "--output", "out.jsonl", "--chat"]
    result = inside("chat.ckpt", *words, *([] if system is None else ["--system", system]))
    assert result.returncode == 0, result.stderr
    template, model = ChatTemplate(CHAT), load(str(folder / "chat.ckpt"))
    ends = set()
    for record, prompt in zip(read("out.jsonl"), ["two\nlines", "你好", "What <|im_start|>is it?", "Hi"], strict=True):
        before = [] if system is None else [Message("system", system)]
        ids = template.encode_prompt([*before, Message("user", prompt)])
        (wanted,) = model.generate([ids], max_new_tokens=12, seed=3, stop_token_ids=[END])
        assert (record["prompt"], record["text"]) == (prompt, wanted)
        ends.add((record["finish_reason"], record["ids"][-1] == END))
    assert ("stop", True) in ends
    template.close()


@pytest.mark.slow
def test_an_answer_is_printed_below_its_question_and_a_stopped_run_resumes(inside: Any) -> None:
    words = ["--chat", "--start", "Hi", "--temperature", "0", "--logit_bias", f'{{"{END}": 1000}}']
    result = inside("chat.ckpt", *words)
    assert (result.returncode, result.stdout) == (0, "Hi\n\n")
    assert inside("chat.ckpt", *words, "--output", "out.jsonl").returncode == 0
    done = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    assert inside("chat.ckpt", *words, "--output", "out.jsonl").returncode == 0
    assert Path("out.jsonl").read_bytes() == done and b'"finish_reason": "stop"' in done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("plain.ckpt", ["--chat", "--start", "a"], "--chat: this model has no chat template, it only continues text"),
        ("bare.ckpt", ["--chat", "--start", "a"], "--chat: this model came without a tokenizer"),
        ("chat.ckpt", ["--system", "Be kind", "--start", "a"], "--system 'Be kind' is for conversations: give --chat"),
        ("chat.ckpt", ["--chat", "--prompts", "ids.jsonl"], "prompt 1 is a list of ids: --chat needs text"),
        ("chat.ckpt", ["--chat", "--start", "a" * 99], "prompt 1 has 118 tokens, the model's context is 96"),
        ("chat.ckpt", ["--chat"], "there are no prompts"),
        (
            "users.ckpt",
            ["--chat", "--start", "a", "--system", "b"],
            "prompt 1: the model's chat template refuses it: only",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line_before_any_work(name: str, words: list[str], message: str, inside: Any) -> None:
    Path("ids.jsonl").write_text('{"prompt": [1, 2]}\n')
    result = inside(name, *words, "--overflow", "stop", "--output", "out.jsonl")
    assert (result.returncode, result.stdout) == (2, "") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not Path("out.jsonl").exists()


@pytest.mark.slow
def test_the_ids_and_the_trace_of_a_question_have_its_template(folder: Path, inside: Any) -> None:
    words = ["--chat", "--start", "Hi", "--show_ids", "--trace_output", "trace.jsonl", "--min_new_tokens", "1"]
    result = inside("chat.ckpt", *words)
    assert result.returncode == 0, result.stderr
    template = ChatTemplate(CHAT)
    ids = template.encode_prompt([Message("user", "Hi")])
    template.close()
    assert result.stdout.startswith(f"prompt ids {ids}, shape (1, {len(ids)})\nHi\n")
    head, first, *_ = map(json.loads, Path("trace.jsonl").read_text("utf-8").splitlines())
    assert (head["ids"], head["shape"]) == (ids, [1, len(ids)])
    assert head["initial_prompt"] == first["sequence"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
