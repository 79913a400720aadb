"""Traces against transformers' own filters and the model itself; the HTML page in a real browser."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import RunProgram
from models import tiny_gpt
from rich.console import Console

from lit_gpt.checkpoint.format import save_model
from lit_gpt.generation.complete import Completion, complete
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.sampling import Sampler, choose_tokens
from lit_gpt.generation.trace import Trace, Tracer, likeliest, likeliest_before, record_step, traces
from lit_gpt.insight.trace_table import percent, to_table
from lit_gpt.insight.trace_view import to_html, to_lines
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.printable import show_end
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

PROMPT = "农夫山泉 </script>"
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3, "banned_tokens": [65]},
    {"temperature": 1.4, "num_samples": 2},
    {"strategy": "greedy", "frequency_penalty": 0.5},
    {"strategy": "beam", "num_beams": 3, "num_samples": 2},
    {"strategy": "contrastive", "top_k": 3},
    {"strategy": "mcts", "num_simulations": 4, "top_k": 3, "rollout_length": 2},
    {"strategy": "speculative", "temperature": 0.9},
]


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_gpt(block_size=64)


def traced(model: GPT, settings: dict[str, Any]) -> tuple[list[Trace], list[Completion], GenerationConfig, Tokenizer]:
    tokenizer = get_tokenizer("byte")
    generation_config = GenerationConfig.from_dict({"max_new_tokens": 12, "seed": 3, **settings})
    engine = Engine(model, model.config, tokenizer, max_slots=8)
    engine.observer = tracer = Tracer(tokenizer, top=4)
    ((_, completions),) = complete(engine, [tokenizer.encode(PROMPT)], generation_config)
    found = traces(tracer, 0, PROMPT.encode(), tokenizer.encode(PROMPT), completions)
    return found, completions, generation_config, tokenizer


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("strategy", "sample"))
def test_every_strategy_records_how_it_chose(model: GPT, settings: dict[str, Any]) -> None:
    found, completions, generation_config, tokenizer = traced(model, settings)
    assert len(found) == generation_config.num_samples
    for trace, completion in zip(found, completions):
        ids = tokenizer.encode(PROMPT)
        assert [step.chosen.id for step in trace.steps] == completion.ids
        for position, step in enumerate(trace.steps):
            before = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert step.position == position
            assert step.chosen.before == pytest.approx(before[step.chosen.id].item(), rel=1e-9)
            assert step.rank == 1 + int((before > before[step.chosen.id]).sum())
            assert step.entropy_before == pytest.approx(-(before * before.log2()).sum().item())
            for candidate in step.candidates:
                assert candidate.before == pytest.approx(before[candidate.id].item(), rel=1e-9)
                assert (candidate.after == 0) == (candidate.cut_by is not None)
            assert {int(i) for i in before.topk(4).indices} <= {candidate.id for candidate in step.candidates}
            if step.how == "largest":
                assert step.candidates[0].id == step.chosen.id
            if step.how == "drawn":
                low, high = step.interval or (1, 0)
                assert step.draw is not None and low - 1e-9 <= step.draw < high + 1e-9
                assert high - low == pytest.approx(step.chosen.after)
            ids.append(step.chosen.id)


def test_what_was_cut_is_what_transformers_cuts(model: GPT) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    (trace,), _, _, tokenizer = traced(model, SETTINGS[0])
    filters = {
        "forbidden": [RepetitionPenaltyLogitsProcessor(1.3), SuppressTokensLogitsProcessor([65])],
        "top_k": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40)],
        "top_p": [TopPLogitsWarper(0.8)],
        "min_p": [MinPLogitsWarper(0.02)],
    }
    ids = tokenizer.encode(PROMPT)
    for step in trace.steps:
        scores = model(torch.tensor([ids])).logits[:, -1]
        before, expected = scores.softmax(-1), []
        for name, steps in filters.items():
            alive = scores > -math.inf
            scores = LogitsProcessorList(steps)(torch.tensor([ids]), scores)
            gone = alive & (scores == -math.inf)
            if gone.any():
                expected.append((name, int(gone.sum()), before[gone].sum().item()))
        assert [(cut.by, cut.tokens) for cut in step.cuts] == [(name, count) for name, count, _ in expected]
        assert [cut.mass for cut in step.cuts] == pytest.approx([mass for *_, mass in expected])
        after = scores.softmax(-1)[0]
        assert step.kept == int((after > 0).sum())
        for candidate in step.candidates:
            assert candidate.after == pytest.approx(after[candidate.id].item(), rel=1e-9)
        ids.append(step.chosen.id)


def test_a_tracer_changes_no_text(model: GPT) -> None:
    _, completions, generation_config, tokenizer = traced(model, SETTINGS[1])
    engine = Engine(model, model.config, tokenizer, max_slots=8)
    ((_, unwatched),) = complete(engine, [tokenizer.encode(PROMPT)], generation_config)
    assert [one.ids for one in unwatched] == [one.ids for one in completions]


def test_lines_of_json_and_a_table(model: GPT) -> None:
    found, _, _, tokenizer = traced(model, SETTINGS[1])
    records = [json.loads(line) for line in to_lines(found, tokenizer)]
    steps = [record for record in records if "position" in record]
    assert [(step["sample"], step["position"]) for step in steps] == [(s, i) for s in range(2) for i in range(12)]
    assert steps[0]["candidates"][0].keys() == {"id", "piece", "before", "after", "cut_by"}
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for trace in found:
        console.print(to_table(trace, tokenizer))
    shown = console.export_text()
    assert "\ufffd" not in shown and "sample 2" in shown and found[0].steps[0].chosen.piece in shown
    assert [percent(share) for share in (0.0, 1e-6, 0.0123, 0.5, 1.0)] == ["0%", "<0.1%", "1.2%", "50%", "100%"]


def test_it_begins_with_the_prompt_and_shows_the_sequence_so_far(model: GPT) -> None:
    found, completions, _, tokenizer = traced(model, SETTINGS[1])
    ids = tokenizer.encode(PROMPT)
    records = [json.loads(line) for line in to_lines(found, tokenizer)]
    for sample, completion in enumerate(completions):
        head, *steps = records[13 * sample : 13 * (sample + 1)]
        shape = [1, len(ids)]
        assert head == {"prompt": 0, "sample": sample, "initial_prompt": PROMPT, "ids": ids, "shape": shape}
        for count, step in enumerate(steps):
            so_far = tokenizer.decode_bytes([*ids, *completion.ids[:count]])
            assert step["sequence"] == so_far.decode("utf-8", "backslashreplace")
            assert step["shape"] == [1, len(ids) + count]
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_table(found[0], tokenizer))
    shown = " ".join(console.export_text().split())
    assert f"initial prompt: {PROMPT} ids [{', '.join(map(str, ids))}], shape (1, {len(ids)})" in shown
    assert f"after {show_end(PROMPT.encode(), 24)}" in shown


def test_a_sequence_of_ids_and_one_that_ends_inside_a_character() -> None:
    tokenizer = get_tokenizer("byte")
    steps = [
        record_step(Sampler(GenerationConfig(), [0], 257), torch.zeros(257), token, likeliest(1), str)
        for token in (*"农".encode()[1:], tokenizer.eot_id or 0, 65)
    ]
    half = Trace(0, 0, "农".encode()[:1], list("农".encode()[:1]), "", steps)
    assert [show_end(text, 3) for text in half.sequences(tokenizer)] == [r"\xe5", r"\xe5\x86", "农", "…t|>"]
    assert [text.decode() for text in half.sequences(None)][:2] == ["[229]", "[229, 134]"]


def test_what_greedy_cuts_is_named_greedy_everywhere(model: GPT) -> None:
    found, _, _, tokenizer = traced(model, {"strategy": "greedy", "banned_tokens": [65]})
    for step in found[0].steps:
        assert [cut.by for cut in step.cuts] == ["forbidden", "greedy"]
        assert step.cuts[-1].tokens == 255 and step.kept == 1 and step.entropy_after == 0
        assert step.chosen.after == 1 and step.chosen.cut_by is None and step.chosen.interval is None
        assert {one.cut_by for one in step.candidates if one.id != step.chosen.id} <= {"forbidden", "greedy"}
    (_, line, *_) = to_lines(found, tokenizer)
    assert json.loads(line)["cuts"][-1]["by"] == "greedy" and '"cut_by": "greedy"' in line
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_table(found[0], tokenizer))
    assert "→greedy" in console.export_text()
    assert '"by": "greedy"' in to_html(found, tokenizer)


def test_the_candidates_intervals_tile_the_line(model: GPT) -> None:
    generation_config = GenerationConfig(temperature=0.8, top_p=0.7, repetition_penalty=1.4, seed=2)
    sampler = Sampler(generation_config, [1, 2, 3], 257, seed=2)
    raw = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    (token,) = choose_tokens([sampler], raw[None])
    step = record_step(sampler, raw, token, likeliest_before(257), str)
    assert [one.before for one in step.candidates] == sorted((one.before for one in step.candidates), reverse=True)
    assert all((one.interval or (0, 1))[1] == (one.interval or (0, 0))[0] for one in step.candidates if one.cut_by)
    intervals = sorted(one.interval or (0, 0) for one in step.candidates if one.cut_by is None)
    assert len(intervals) == step.kept and intervals[0][0] == 0 and intervals[-1][1] == pytest.approx(1)
    assert all(one[1] == pytest.approx(after[0]) for one, after in pairwise(intervals))
    low, high = step.interval or (1, 0)
    assert step.draw is not None and low <= step.draw < high


def test_a_penalty_that_overflows_is_what_cut() -> None:
    sampler = Sampler(GenerationConfig(repetition_penalty=1e38, top_k=2), [1], 4)
    step = record_step(sampler, torch.tensor([0.0, -100.0, 1.0, 2.0]), 3, likeliest_before(4), str)
    assert [one.cut_by for one in step.candidates] == [None, None, "top_k", "repetition_penalty"]


def test_a_chosen_token_beyond_the_limit_is_listed_last() -> None:
    before = torch.tensor([0.5, 0.3, 0.2])
    assert likeliest_before(2)(before, before, 2) == [0, 1, 2]
    assert likeliest_before(2)(before, before, 1) == [0, 1]
    assert likeliest_before(9)(before, before, 1) == [0, 1, 2]
    after = torch.tensor([0.0, 0.4, 0.6])
    assert likeliest(1)(before, after, 1) == [2, 1, 0]


def test_a_search_at_temperature_0_chooses_by_search(model: GPT) -> None:
    (trace,), *_ = traced(model, {**SETTINGS[5], "temperature": 0.0})
    assert {step.how for step in trace.steps} == {"mcts"}
    assert all(not step.cuts for step in trace.steps)


@pytest.mark.slow
def test_predict_shows_and_writes_its_trace(tmp_path: Path, model: GPT, program: RunProgram) -> None:
    save_model(tmp_path / "x.ckpt", GPT(model.config), get_tokenizer("byte"))
    run = program(
        "predict", "--ckpt_path", "x.ckpt", "--start", "ab", "--num_samples", 2, "--max_new_tokens", 5, "--trace",
        "--trace_output", "t.jsonl", "--trace_html", "t.html", "--top_k", 9, "--min_new_tokens", 5, "--seed", 1,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    shown = " ".join(run.stdout.split())
    assert "prompt 1, sample 2 initial prompt: ab ids [97, 98], shape (1, 2)" in shown
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    heads, steps = ([one for one in records if ("kept" in one) == is_step] for is_step in (False, True))
    assert [(one["initial_prompt"], one["ids"], one["shape"]) for one in heads] == [("ab", [97, 98], [1, 2])] * 2
    assert len(steps) == 10 and {one["kept"] for one in steps} == {9}
    assert (tmp_path / "t.html").read_text().startswith("<!doctype html>")


CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no {CHROMIUM} on this machine")
def test_the_page_in_a_browser(model: GPT, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    found, _, _, tokenizer = traced(model, {**SETTINGS[0], "seed": 5})
    half = next(step for step in found[0].steps if step.chosen.id > 127)
    (tmp_path / "trace.html").write_text(to_html(found, tokenizer))
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if "file:" not in request.url else None)
        page.goto(f"file://{tmp_path}/trace.html")
        tokens = page.locator(".token")
        assert tokens.count() == len(found[0].steps)
        assert page.locator(".prompt").text_content() == PROMPT
        assert f"shape (1, {len(tokenizer.encode(PROMPT))})" in (page.locator(".ids").text_content() or "")
        card = page.locator("#card")
        assert not card.is_visible()
        tokens.nth(half.position).hover()
        assert card.is_visible() and f"id {half.chosen.id}" in (card.text_content() or "")
        *_, so_far = zip(range(half.position + 1), found[0].sequences(tokenizer))
        assert f": {show_end(so_far[1], 60)}" in (card.text_content() or "")
        assert tokens.nth(half.position).text_content() == f"\\x{half.chosen.id:02x}"
        assert card.locator("tbody tr").count() == len(half.candidates)
        assert card.locator("tr.cut").count() == sum(one.cut_by is not None for one in half.candidates)
        page.mouse.move(0, 0)
        assert not card.is_visible()
        tokens.nth(0).focus()
        assert card.is_visible()
        page.keyboard.press("Enter")
        tokens.nth(1).hover()
        assert f"id {found[0].steps[0].chosen.id}," in (card.text_content() or "")  # it is pinned
        page.keyboard.press("Escape")
        assert not card.is_visible()
        assert "\ufffd" not in (page.locator("body").text_content() or "")
        browser.close()
    assert not problems
