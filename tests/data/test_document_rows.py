"""Rows of documents: every token a target once, each row begins with a document, and what is masked from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.document_rows import DocumentRows, cut_documents
from lit_gpt.data.masks import READ_AT_ONCE
from lit_gpt.data.prepare import prepare
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.data.shards import write_shard
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError
from lit_gpt.model.documents import DocumentMasks

EOT = 999


def stream_of(folder: Path, ids: list[int]) -> TokenStream:
    """In two shards, where there are enough."""
    for number, part in enumerate((ids[: len(ids) // 2], ids[len(ids) // 2 :])):
        with write_shard(folder / f"train_{number}.bin", "uint16") as writer:
            writer.add(np.array(part))
    return open_tokens(folder, "train")


@pytest.mark.slow
@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    first=st.booleans(),
    block_size=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_every_token_but_the_first_is_a_target_once_beside_those_of_its_document(
    lengths: list[int], first: bool, block_size: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = [EOT] * first  # before each document, or after each
    for length in lengths:
        ids += [*range(len(ids), len(ids) + length), EOT]
    ids += [0] * (2 - len(ids))
    rows = DocumentRows(stream_of(tmp_path_factory.mktemp("rows"), ids), EOT, block_size, seed)
    positions = np.full(len(ids), -1)  # of each token as an input, in its document
    start = 0
    for at, token in enumerate(ids):
        start = at if token == EOT else start
        positions[at] = (at - start) % block_size
    batch = rows.read(range(len(rows)), len(rows) + 1, pin=False)
    assert batch.documents is not None
    masks = DocumentMasks(batch.documents)
    visible = masks.visible(None)[:, 0]
    seen = []
    for row in range(len(rows)):
        spans = rows.documents(row)
        assert ids[spans[0][0]] == EOT or spans[0][0] == 0 or positions[spans[0][0]] == 0
        end = 0
        for span, length in spans:
            seen += range(span + 1, span + length + 1)
            here = slice(end, end + length)
            assert batch.idx[row, here].tolist() == ids[span : span + length]
            assert batch.targets[row, here].tolist() == ids[span + 1 : span + length + 1]
            assert masks.positions[row, here].tolist() == positions[span : span + length].tolist()
            for query in range(end, end + length):  # sees its own document up to itself, and nothing else
                assert visible[row, query].nonzero()[:, 0].tolist() == list(range(end, query + 1))
            end += length
        assert (batch.targets[row, end:] == IGNORE_INDEX).all() and not batch.idx[row, end:].any()
    assert sorted(seen) == list(range(1, len(ids)))
    assert (batch.targets[-1] == IGNORE_INDEX).all()  # a row that is only padding
    assert f"{len(ids):,} tokens in {len(rows):,} rows of {block_size}" in rows.report


def test_long_documents_are_cut_and_counted() -> None:
    assert cut_documents(np.array([0, 3, 23]), 24, 8).tolist() == [0, 3, 11, 19, 23]


def test_starts_are_found_across_the_parts_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [1, EOT, 2, 3, EOT, 4, 5, 6, EOT, EOT, 7, EOT]
    whole = DocumentRows(stream_of(tmp_path, ids), EOT, 4, 0)
    spans = {row: whole.documents(row) for row in range(len(whole))}
    assert sorted(span for row in spans.values() for span in row) == [(0, 1), (1, 3), (4, 4), (8, 1), (9, 2)]
    assert len(ids) < READ_AT_ONCE
    for size in (1, 2, 5):
        monkeypatch.setattr("lit_gpt.data.document_rows.READ_AT_ONCE", size)
        again = DocumentRows(whole.tokens, EOT, 4, 0)
        assert {row: again.documents(row) for row in range(len(again))} == spans


# ---------------------------------------------------------------- the data module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    for number in range(60):
        (root / f"{number:02d}.txt").write_text(f"{number} the quick brown fox\n" * (1 + number * number % 17))
    prepare(str(root / "*.txt"), root / "out", "byte", val_split="hash:0.2", workers=1)
    return root / "out"


def module(folder: Path, **options: Any) -> TokenDataModule:
    values = {"path": str(folder), "rows": "documents", "block_size": 128, "batch_size": 2, **options}
    data = TokenDataModule(**values)
    data.setup("fit")
    return data


def test_rows_of_a_prepared_folder_resumed_and_validated_as_ever(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = module(folder)
    said = capsys.readouterr().err
    assert "train: " in said and " documents of " in said and "cuts in longer ones" in said and "val: " not in said
    steps = len(data.train_dataloader())
    wanted = [batch.idx.tolist() for _ in range(2) for batch in data.train_dataloader()]
    assert len({tuple(row) for rows in wanted[:steps] for row in rows}) == 2 * steps
    first = module(folder)
    batches = iter(first.train_dataloader())
    assert [next(batches).idx.tolist() for _ in range(3)] == wanted[:3]
    second = module(folder)
    second.load_state_dict(first.state_dict())
    assert [batch.idx.tolist() for batch in second.train_dataloader()] == wanted[3 : steps + 3]
    assert next(iter(module(folder, attend_across=True).train_dataloader())).documents is None
    stream = module(folder, rows="stream")
    for ours, theirs in zip(data.val_dataloader(), stream.val_dataloader(), strict=True):
        assert ours.idx.equal(theirs.idx) and ours.documents is None
    for one, other, message in [
        (data, stream, "data.rows gives rows documents, the run's is stream"),
        (stream, data, "data.rows gives rows stream, the run's is documents"),
    ]:
        with pytest.raises(UserError, match=message):
            one.load_state_dict(other.state_dict())


def test_refusals(folder: Path, tmp_path: Path) -> None:
    for options, message in [
        ({"format": "chat"}, "data.rows=documents is for text, chat has rows of its own"),
        ({"shuffle_tokens": 9}, "shuffle_tokens is for text, all rows of documents are shuffled together"),
        ({"rows": "stream", "attend_across": True}, "not for text without data.rows documents"),
        ({"path": "https://example.org/x"}, "data.rows=documents reads all tokens: fetch https://example.org/x into"),
    ]:
        with pytest.raises(UserError, match=message):
            module(folder, **options)
    np.arange(300, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"")  # nobody knows the vocabulary
    with pytest.raises(UserError, match="no end-of-text stands between its documents"):
        module(tmp_path)
