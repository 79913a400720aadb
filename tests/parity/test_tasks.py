"""`validate --tasks` against transformers: each text alone, by lm-evaluation-harness' formulas, in float64.

`scripts/check_tasks.py` runs the harness itself, which takes some 30 more packages.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import FIXTURES

from lit_gpt.__main__ import main

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Harness:
    """The part of lm-evaluation-harness that is compared with, in few lines: HFLM, a batch of one text."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.max_length = self.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        if context == "":
            before, after = [self.tokenizer.eos_token_id], self.encode(continuation)
        else:
            spaces = len(context) - len(context.rstrip())
            if spaces:
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            before = self.encode(context)
            after = self.encode(context + continuation)[len(before) :]
        read = torch.tensor((before + after)[-(self.max_length + 1) :][:-1])
        logprobs = self.model(read[None]).logits[0].log_softmax(-1)[-len(after) :]
        wanted = torch.tensor(after)
        return float(logprobs.gather(1, wanted[:, None]).sum()), bool((logprobs.argmax(-1) == wanted).all())

    def next_text(self, context: str) -> str:
        """What greedy decoding writes after a context."""
        with torch.no_grad():
            return self.tokenizer.decode([int(self.model(torch.tensor([self.encode(context)])).logits[0, -1].argmax())])


def some_questions(harness: Harness) -> list[dict[str, Any]]:
    """Parts of a text, in both scripts; some contexts end with spaces, are empty, or longer than the model's."""
    draw, text = random.Random(4), (FIXTURES / "text.txt").read_text("utf-8")

    def part(most: int) -> str:
        start = draw.randrange(len(text) - most)
        return text[start : start + draw.randint(1, most)]

    lines: list[dict[str, Any]] = []
    for number in range(18):
        query = "" if number % 10 == 0 else part(400).strip() + "  " * (number % 3 == 0)
        choices = [part(8).strip() or "x" for _ in range(2 + number % 3)]
        line = {"query": query, "choices": choices, "gold": draw.randrange(len(choices))}
        lines.append(line | ({"target_delimiter": ""} if number % 6 == 0 else {}))
    for number in range(18):
        context = part(30).rstrip() or "All"
        continuation = part(6) if number % 2 else harness.next_text(context)
        if harness.tokenizer.eos_token in continuation:
            continue  # which is plain text here, and a special token there
        if len(harness.encode(context + continuation)) > len(harness.encode(context)):
            lines.append({"context": context, "continuation": continuation})
    return lines


def expected_figures(harness: Harness, lines: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for line in lines:
        if "context" in line:
            value, greedy = harness.loglikelihood(line["context"], line["continuation"])
            scores = {"cloze/acc": float(greedy), "cloze/log_likelihood": value}
        else:
            delimiter, choices = line.get("target_delimiter", " "), line["choices"]
            values = [harness.loglikelihood(line["query"], delimiter + choice)[0] for choice in choices]
            scores = {}
            for name, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
                normed = [value / size(choice) for value, choice in zip(values, choices)]
                scores[f"multiple_choice/{name}"] = float(normed.index(max(normed)) == line["gold"])
        for name, score in scores.items():
            found.setdefault(name, []).append(score)
    figures = {name: sum(values) / len(values) for name, values in found.items()}
    for name, values in found.items():
        squares = sum((value - figures[name]) ** 2 for value in values)
        figures[f"{name}_stderr"] = math.sqrt(squares / (len(values) - 1)) / math.sqrt(len(values))
    figures["cloze/perplexity"] = math.exp(-figures["cloze/log_likelihood"])
    return {f"val/{name}": value for name, value in figures.items()}


@pytest.mark.slow
def test_the_figures_are_those_of_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ckpt = str(FIXTURES / "gpt2.ckpt")
    assert main(["convert", ckpt, "published", "--to", "hf"]) == 0
    harness = Harness(tmp_path / "published")
    lines = some_questions(harness)
    Path("tasks.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    wanted = expected_figures(harness, lines)
    assert 0 < wanted["val/cloze/acc"] < 1
    for source in (["--ckpt_path", ckpt], ["--init_from", "published"]):
        capsys.readouterr()
        words = ["--trainer.precision", "64-true", "--trainer.accelerator", "cpu", "--data.batch_size", "7"]
        assert main(["validate", *source, "--tasks", "tasks.jsonl", *words]) == 0
        printed = capsys.readouterr()
        assert "longer than the context of" in printed.err
        found = {line.split()[0]: float(line.split()[1]) for line in printed.out.splitlines()}
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)
