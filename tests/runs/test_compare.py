"""`lit_gpt compare`: the figures, what is refused, and the table, the JSON and the page of one comparison."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import FIXTURES
from run_folders import make_config, write_run

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.checkpoint.format import load_model
from lit_gpt.errors import UserError
from lit_gpt.runs.text_score import WINDOW_BYTES, score_text

TEXT = FIXTURES / "text.txt"
NO_SAMPLES = ("--num_samples", "0")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configurations with five seeds each, of which B is better, a third one that is like A, and runs like none."""
    folder = tmp_path_factory.mktemp("logs")
    for seed in range(5):
        wave = 0.1 * math.sin(seed)
        write_run(folder / f"a{seed}", [3.0, 2.0 + wave], seed)
        write_run(folder / f"b{seed}", [3.0, 1.9 + wave + 0.01 * math.cos(seed)], seed, model__optimizer__lr=0.003)
        like_a = 2.0 + wave + 0.01 * math.cos(2.4 * seed)
        write_run(folder / f"c{seed}", [3.0, like_a], seed, model__config__n_layer=3)
    write_run(folder / "going", [3.0], finished=False, model__config__n_layer=9)
    write_run(folder / "other_text", about={"val_sha256": "c"})
    write_run(folder / "other_tokenizer", about={"tokenizer": "u" * 64})
    write_run(folder / "part", trainer__limit_val_batches=1)
    write_run(folder / "fresh", [], finished=False)
    (folder / "short.txt").write_text("short")
    return folder


@pytest.fixture
def logs(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of those runs, which is the current one, and to which nothing is written."""
    monkeypatch.chdir(written)
    return written


def names(*letters: str) -> list[str]:
    return [f"{letter}{seed}" for letter in letters for seed in range(5)]


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *argv, "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_groups_of_seeds_are_judged_and_what_differs_is_told(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *names("a", "b", "c"), *NO_SAMPLES)
    labels = ["n_layer=2, lr=0.001", "n_layer=2, lr=0.003", "n_layer=3, lr=0.001"]
    assert [group["label"] for group in found["groups"]] == labels
    assert set(found["differing"]) == {"seed_everything", "model.optimizer.lr", "model.config.n_layer"}
    verdicts = {(each["first"], each["second"]): each for each in found["differences"]}
    assert verdicts["A", "B"]["verdict"] == "B is better" and verdicts["A", "B"]["paired"]
    assert verdicts["A", "C"]["verdict"] == "no difference shown"
    assert verdicts["B", "C"]["verdict"] == "B is better"
    low, high = verdicts["A", "B"]["interval_95"]
    assert low < 0.1 < high
    assert any("3 comparisons" in remark and "Holm" in remark for remark in found["remarks"])
    first = found["runs"][0]
    assert (first["loss"], first["parameters"], first["steps"], first["peak_memory_bytes"]) == (2.0, 1234, 20, 1 << 20)
    assert [point["flops"] for point in first["curve"]] == [1e6, 2e6]
    capsys.readouterr()
    assert main(["compare", *names("a", "b"), *NO_SAMPLES]) == 0
    table = capsys.readouterr().out
    assert "B is better" in table and "model.optimizer.lr" in table and "0.001: A;  0.003: B" in table
    assert "n_layer" not in table, "what does not differ is not told"
    found = as_json(capsys, *names("a", "b", "c"), *NO_SAMPLES, "--baseline", "c2")
    assert [(each["first"], each["second"]) for each in found["differences"]] == [("A", "C"), ("B", "C")]


def test_one_seed_each_is_no_judgement_and_it_says_so(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "a0", "b0", *NO_SAMPLES)
    assert [each["verdict"] for each in found["differences"]] == ["cannot be judged: one seed"]
    assert any("one seed says nothing" in remark for remark in found["remarks"])
    found = as_json(capsys, "a0", "a1", *NO_SAMPLES)
    assert found["differences"] == [] and found["groups"][0]["label"] == "all runs"
    found = as_json(capsys, "a0", "going", *NO_SAMPLES)
    assert any(remark.startswith("not finished") and "B1" in remark for remark in found["remarks"])
    assert any("trained for different steps" in remark for remark in found["remarks"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "compare needs runs"),
        (["a0"], "one run, a0, compares with nothing"),
        (["a0", "a0"], "a0 is the same run as a0"),
        (["a0", "nowhere"], "nowhere does not exist"),
        (["a0", "b0", "--format", "jsn"], 'did you mean "json"'),
        (["a0", "b0", "--num_samples", "99"], "outside 0 … 20"),
        (["a0", "b0", "--temperature", "-1"], "temperature"),
        (["a0", "b0", "--plot", "x.gif"], r"must end in \.png"),
        (["a0", "b0", "--html", "no/such/x.html"], "in a folder that exists"),
        (["a0", "b0", "--baseline", "c0", *NO_SAMPLES], "none of the runs"),
        (["a0", "b0", "--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        (["a0", "b0", "--text", "short.txt"], "two windows"),
        (["a0", "b0", "--text", str(TEXT), *NO_SAMPLES], "a0 has no checkpoint"),
        (["a0", "other_text", *NO_SAMPLES], "another validation text than a0.*--text FILE"),
        (["a0", "other_tokenizer", *NO_SAMPLES], "another tokenizer than a0.*--text FILE"),
        (["a0", "part", *NO_SAMPLES], "another validation text than a0"),
        (["a0", "fresh", *NO_SAMPLES], "has made no validation yet"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_one_line(
    logs: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    before = sorted(logs.rglob("*"))
    assert main(["compare", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(message, printed.err), printed.err
    assert len(printed.err.strip().splitlines()) == 1 and sorted(logs.rglob("*")) == before


@pytest.mark.slow
def test_runs_of_earlier_versions_are_known_by_their_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "older"):
        write_run(tmp_path / name, [], finished=False, checkpoint=FIXTURES / "modern.ckpt")
        (tmp_path / name / "run.jsonl").unlink()
    found = as_json(capsys, "old", "older", *NO_SAMPLES, "--text", str(TEXT))
    model, _ = load_model(FIXTURES / "modern.ckpt")
    assert found["runs"][0]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["runs"][0]["text_bits_per_byte"] == found["runs"][1]["text_bits_per_byte"]
    assert any("did not record it" in remark for remark in found["remarks"])


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2.ckpt", "modern.ckpt"])
def test_bits_per_byte_are_those_of_the_logits_in_double_precision(name: str) -> None:
    gpt, text = load(str(FIXTURES / name), precision="fp32"), TEXT.read_text("utf-8")[: 5 * WINDOW_BYTES // 2]
    assert gpt.tokenizer is not None
    score = score_text(gpt, text, name)
    ids = gpt.tokenizer.encode(text)
    if gpt.tokenizer.eot_id is not None:
        ids = [gpt.tokenizer.eot_id, *ids]
    model, size, nats = load_model(FIXTURES / name)[0].double(), gpt.config.block_size, 0.0
    for start in range(0, len(ids) - 1, size):
        part = ids[start : start + size + 1]
        with torch.no_grad():
            logprobs = model(torch.tensor([part[:-1]])).logits[0].log_softmax(-1)
        nats -= float(logprobs[range(len(part) - 1), part[1:]].sum())
    lengths = [len(gpt.tokenizer.token_bytes(token)) for token in ids[1:]]
    assert score.tokens == len(lengths) and score.bytes == sum(lengths)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / sum(lengths), rel=1e-4)
    assert len(score.windows) == 2
    assert min(score.windows) <= score.bits_per_byte <= max(score.windows)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of other tokenizers, with models."""
    monkeypatch.chdir(tmp_path)
    hostile = "<script>alert(1)</script>\x1b[31m"
    write_run(tmp_path / "one", checkpoint=FIXTURES / "modern.ckpt", samples__prompts=["First"])
    write_run(
        tmp_path / "two", checkpoint=FIXTURES / "gpt2.ckpt", about={"tokenizer": "u" * 64, "val_sha256": "c"},
        data__source=hostile, samples__prompts=["First"],
    )  # fmt: skip
    return tmp_path


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_with_a_text_other_tokenizers_compare_by_it_and_the_page_is_whole_and_safe(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["one", "two", "--text", str(TEXT), "--html", "page.html", "--plot", "curves.svg", "--num_samples", "2"]
    found = as_json(capsys, *argv, "--max_new_tokens", "12", "--start", "<b>&amp;")
    assert found["judged_by"] == "text_bits_per_byte"
    assert "loss" not in found["runs"][0] and found["runs"][0]["text_bits_per_byte"] > 0
    assert any("losses and bits per byte of the validation are left out" in remark for remark in found["remarks"])
    (each,) = found["differences"]
    low, high = each["windows_95"]
    assert low < each["difference"] < high, "the windows' spread, apart from that of seeds"
    assert each["verdict"] == "cannot be judged: one seed"
    assert [(sample["prompt"], sample["seed"], set(sample["texts"])) for sample in found["samples"]] == [
        ("<b>&amp;", seed, {"A", "B"}) for seed in (1, 2)
    ]
    gpt = load(str(FIXTURES / "modern.ckpt"), precision="fp32")
    settings = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 50, "num_samples": 2, "seed": 1}
    assert gpt.generate("<b>&amp;", **settings) == [sample["texts"]["A"] for sample in found["samples"]]
    text = Path("page.html").read_text("utf-8")
    page = Page()
    page.feed(text)
    tags = [tag for tag, _ in page.tags]
    assert "svg" in tags and "script" not in tags and "b" in tags and tags.count("html") == 1
    assert not any(name in ("src", "action") or name.startswith("on") for _, attrs in page.tags for name in attrs)
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "xlink:href")]
    assert all(str(link).startswith(("#", "data:")) for link in links), "it fetches nothing"
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in text
    assert Path("curves.svg").stat().st_size > 1000
    capsys.readouterr()
    assert main(["compare", *argv, "--max_new_tokens", "12"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "text bits/byte" in printed and " loss " not in printed
    assert "after 'First', seed 1:" in printed, "the prompts of the runs themselves"


def test_the_samples_of_runs_with_other_prompts_begin_with_a_line_end(tmp_path: Path) -> None:
    from lit_gpt.runs.record import read_run
    from lit_gpt.runs.samples import prompts_of

    runs = [read_run(write_run(tmp_path / name, samples__prompts=[name])) for name in "ab"]
    assert prompts_of(runs, []) == ("\n",) and prompts_of(runs[:1], []) == ("a",) and prompts_of(runs, ["x"]) == ("x",)
    assert make_config()["samples"]["prompts"] == ["def "]
    with pytest.raises(UserError):
        read_run(tmp_path / "c")
