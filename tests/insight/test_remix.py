"""Remix: matches against a brute-force search, figures by hand, a model that remembers and one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import save_model
from lit_gpt.data import matches
from lit_gpt.data.matches import Match, longest_matches
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.insight.remix.main import open_corpus, remix
from lit_gpt.insight.remix.novelty import held_out_windows, longest_spans, novelty
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer


class Array:
    """A stream of tokens in memory."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = np.asarray(tokens, np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= len(self)
        return self.tokens[start : start + count]


def brute_force(text: list[int], stream: list[int]) -> list[int]:
    """The definition, word for word."""

    def longest(i: int) -> int:
        return max(
            (
                n
                for n in range(len(text) - i + 1)
                if any(stream[p : p + n] == text[i : i + n] for p in range(len(stream)))
            ),
            default=0,
        )

    return [longest(i) for i in range(len(text))]


tokens = st.integers(0, 2)
runs = st.lists(tokens, max_size=6).flatmap(lambda run: st.integers(1, 4).map(lambda times: run * times))
text = st.lists(runs, max_size=4).map(lambda parts: [token for part in parts for token in part])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(text, max_size=4), st.lists(text, max_size=4), st.integers(1, 30))
@pytest.mark.parametrize("collide", [False, True])
def test_lengths_and_positions_equal_brute_force(
    collide: bool, texts: list[list[int]], parts: list[list[int]], piece: int
) -> None:
    stream = [token for part in parts for token in part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matches, "_FIRST_PIECE", 5)
        patch.setattr(matches, "_BLOCK", 7)
        if collide:  # every n-gram of a length has the hash of every other one
            patch.setattr(matches, "_codes", lambda count: np.zeros(count, np.uint64))
        found = longest_matches([np.array(text) for text in texts], Array(stream), piece=piece)
    assert len(found) == len(texts)
    for text, match in zip(texts, found):
        assert match.lengths.tolist() == brute_force(text, stream)
        for i, (n, position) in enumerate(zip(match.lengths.tolist(), match.positions.tolist())):
            assert (position == -1) == (n == 0)
            assert n == 0 or stream[position : position + n] == text[i : i + n]


def test_figures_by_hand() -> None:
    # Two texts: matches of 3, 2, 1, 0 tokens, and one text of a single matched token.
    found = [Match(np.array([3, 2, 1, 0]), np.arange(4)), Match(np.array([1]), np.array([7]))]
    figures = novelty(found)
    assert (figures.texts, figures.tokens, figures.longest, figures.mean) == (2, 5, 3, 7 / 5)
    assert figures.novel[2] == 1 / 3  # bigrams at 0, 1 and 2; the last one is new
    assert figures.novel[3] == 1 / 2 and figures.novel[4] == 1.0 and figures.novel[5] is None


def test_novel_shares_equal_sets_of_n_grams() -> None:
    generator = np.random.default_rng(0)
    stream, text = generator.integers(5, size=400), generator.integers(5, size=50)
    figures = novelty(longest_matches([text], Array(stream)))
    for n, share in figures.novel.items():
        known = {tuple(stream[i : i + n]) for i in range(len(stream) - n + 1)}
        new = [tuple(text[i : i + n]) not in known for i in range(len(text) - n + 1)]
        assert share == pytest.approx(sum(new) / len(new))


def test_held_out_windows_do_not_overlap() -> None:
    stream = Array(np.arange(100))
    windows = held_out_windows(stream, [30, 20, 40])  # type: ignore[arg-type]
    assert [len(window) for window in windows] == [30, 20, 40]
    assert len(np.unique(np.concatenate(windows))) == 90
    assert [len(window) for window in held_out_windows(stream, [60, 60])] == [60]  # type: ignore[arg-type]
    assert len(held_out_windows(stream, [300])[0]) == 100  # type: ignore[arg-type]


DOCUMENTS = [
    "The owl sat on the old oak and said nothing at all about the rain.\n",
    "Sixty-four kettles were boiling in the kitchen of the grand hotel while the cook slept under the table.\n",
    "Nobody knows how the lighthouse keeper learned to play the accordion.\n",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards made by the program, in bytes."""
    folder = tmp_path_factory.mktemp("remix")
    with (folder / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in DOCUMENTS * 7)
    arguments = ["--output", folder / "data", "--tokenizer", "byte", "--val_split", "tail:0.05", "--workers", "1"]
    assert main(["prepare", str(folder / "texts.jsonl"), *map(str, arguments)]) == 0
    return folder / "data"


def checkpoint(folder: Path, path: Path, steps: int) -> Path:
    """A small model after `steps` steps on the second document."""
    torch.manual_seed(0)
    tokenizer = get_tokenizer("byte")
    model = GPT(GPTConfig(vocab_size=257, block_size=128, n_layer=2, n_head=2, n_embd=64, position="rope"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([[256, *tokenizer.encode(DOCUMENTS[1]), 256]])
    for _ in range(steps):
        output = model(ids[:, :-1], ids[:, 1:])
        (output.loss_sum / output.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(path, model, tokenizer)
    return path


@pytest.mark.slow
def test_a_model_that_remembers_and_one_that_does_not(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {}
    for name, steps in (("overfitted", 90), ("fresh", 0)):
        path = checkpoint(corpus, tmp_path / f"{name}.ckpt", steps)
        arguments: list[Any] = ["--ckpt_path", path, "--data.path", corpus, "--num_samples", 2]
        arguments += ["--max_new_tokens", 120, "--output", tmp_path / f"{name}.json"]
        assert main(["remix", *map(str, arguments), "--plot", str(tmp_path / f"{name}.png")]) == 0
        out = capsys.readouterr().out
        assert "new 2-grams" in out and "held-out text" in out
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    span = reports["overfitted"]["spans"][0]
    assert span["length"] >= 60 and span["piece"] in DOCUMENTS[1]
    assert span["document"] in range(1, 21, 3) and DOCUMENTS[1][span["offset"] :].startswith(span["piece"])
    assert (DOCUMENTS[1][: span["offset"]]).endswith(span["before"])
    assert reports["fresh"]["samples"]["longest"] <= 5
    assert reports["fresh"]["samples"]["novel"]["5"] > 0.95 > 0.5 > reports["overfitted"]["samples"]["novel"]["5"]
    assert reports["fresh"]["held_out"]["longest"] == reports["overfitted"]["held_out"]["longest"]


def test_a_span_names_its_shard_document_and_position(corpus: Path) -> None:
    stream, tokenizer = open_tokens(corpus, "train"), get_tokenizer("byte")
    text = "xx learned to play the accordion.\nzz"
    found = longest_matches([np.array(tokenizer.encode(text))], stream)
    first, *rest = longest_spans(found, stream, tokenizer)
    assert first.piece == " learned to play the accordion.\n" and first.start == 2
    assert tokenizer.decode(stream.read(first.position, first.length)) == first.piece
    assert first.to_dict()["place"] == first.position  # the report's key for it
    assert first.document is not None and first.document % 3 == 2 and first.after == ""
    assert first.before == DOCUMENTS[2][max(0, first.offset - 40) : first.offset]  # type: ignore[operator]
    assert first.shard == "train_000000.bin"
    assert all(span.start + span.length <= 2 or span.start >= 2 + first.length for span in rest)


def test_a_given_text_needs_no_model(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "given.txt"
    text.write_text(DOCUMENTS[0])
    assert main(["remix", "--text", str(text), "--data.path", str(corpus), "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"]["longest"] == len(DOCUMENTS[0]) and set(report["samples"]["novel"].values()) == {0.0}
    assert report["texts"][0]["longest_match"] == list(range(len(DOCUMENTS[0]), 0, -1))


def test_bad_input_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: GPT
) -> None:
    def refused(message: str, *arguments: Any) -> None:
        assert main(["remix", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out

    plain = tmp_path / "plain.txt"
    plain.write_text("some text")
    (tmp_path / "empty.txt").touch()
    save_model(tmp_path / "bare.ckpt", tiny_model, None)
    save_model(tmp_path / "other.ckpt", tiny_model, Tokenizer.build("other", ".", get_tokenizer("byte").ranks, {}))
    save_model(tmp_path / "gone.ckpt", tiny_model, get_tokenizer("byte"))
    moved = torch.load(tmp_path / "gone.ckpt")
    moved["datamodule_hyper_parameters"] = {"path": str(tmp_path / "nowhere")}
    torch.save(moved, tmp_path / "gone.ckpt")
    refused("nothing to compare", "--data.path", corpus)
    refused("which shards?", "--text", plain)
    refused("no such folder", "--text", plain, "--data.path", tmp_path / "nowhere")
    refused("No such file", "--text", tmp_path / "none.txt", "--data.path", corpus)
    refused("is empty", "--text", tmp_path / "empty.txt", "--data.path", corpus)
    refused("has no tokenizer", "--ckpt_path", tmp_path / "bare.ckpt", "--data.path", corpus)
    refused("are of another tokenizer", "--ckpt_path", tmp_path / "other.ckpt", "--data.path", corpus)
    refused("that folder is gone", "--ckpt_path", tmp_path / "gone.ckpt")
    refused("must end in .png", "--text", plain, "--data.path", corpus, "--plot", "x.jpeg")
    refused("format 'xml' is unknown", "--text", plain, "--data.path", corpus, "--format", "xml")
    with pytest.raises(ValueError, match="the sample is empty"):
        remix([np.array([], np.int64)], open_corpus(str(corpus)))
