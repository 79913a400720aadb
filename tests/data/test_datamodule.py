"""The DataModule: every token once in validation, the same samples on any number of ranks, and clear refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.loader import Cursor, EvalLoader, RankShare, TrainLoader, prefetched
from lit_gpt.data.prepare import prepare
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.data.shards import write_shard
from lit_gpt.data.shuffle import Shuffle
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer


def make_folder(folder: Path, train: int = 2000, val: int = 100, spec: str = "byte") -> Path:
    tokenizer, shards = get_tokenizer(spec), []
    for split, count in (("train", train), ("val", val)):
        with write_shard(folder / f"{split}_000000.bin", "uint16") as writer:
            writer.add(np.arange(count) % 251)
        shards.append(writer.shard)
    tokenizer.save(folder / "tokenizer.json")
    ShardIndex("uint16", tuple(shards), tokenizer.name, tokenizer.hash, tokenizer.n_vocab).save(folder)
    return folder


def stream_of_positions(folder: Path, count: int) -> TokenStream:
    """Each token is its own position, so a batch says where it was read."""
    with write_shard(folder / "train_0.bin", "uint16") as writer:
        writer.add(np.arange(count))
    return open_tokens(folder, "train")


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 200), block=st.integers(1, 20), rows=st.integers(1, 5), ranks=st.sampled_from([1, 2, 3, 8])
)
def test_validation_counts_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, block: int, rows: int, ranks: int
) -> None:
    stream = stream_of_positions(tmp_path_factory.mktemp("val"), tokens)
    loaders = [EvalLoader(stream, block, RankShare(rows, ranks, rank)) for rank in range(ranks)]
    targets: Counter[int] = Counter()
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) == len(loaders[0])
        for idx, wanted, _ in batches:
            assert idx.shape == wanted.shape == (rows, block)
            counts = wanted != -100
            assert torch.equal(idx[counts] + 1, wanted[counts])
            targets.update(wanted[counts].tolist())
    assert targets == Counter(range(1, tokens))


def test_any_number_of_ranks_takes_the_same_samples(tmp_path: Path) -> None:
    stream = stream_of_positions(tmp_path, 5000)
    order = Shuffle(5000, 16, seed=3)
    steps = {}
    for ranks, accumulate in [(1, 1), (1, 8), (2, 4), (4, 1), (8, 1)]:
        per_rank = []
        for rank in range(ranks):
            loader = TrainLoader(
                stream, order, Cursor(), RankShare(8 // ranks // accumulate or 1, ranks, rank, accumulate)
            )
            per_rank.append([batch[0][:, 0].tolist() for batch in loader])
        steps[ranks, accumulate] = [
            sorted(row for batches in per_rank for rows in batches[step : step + accumulate] for row in rows)
            for step in range(0, len(per_rank[0]), accumulate)
        ]
    assert all(found == steps[1, 1] for found in steps.values())
    seen = [row for rows in steps[1, 1] for row in rows]
    assert len(seen) == len(set(seen)) == order.samples // 8 * 8


def test_the_cursor_moves_before_the_batch_is_handed_out(tmp_path: Path) -> None:
    stream, order, cursor = stream_of_positions(tmp_path, 1000), Shuffle(1000, 16, seed=3), Cursor()
    loader = TrainLoader(stream, order, cursor, RankShare(2, accumulate=2))
    iter(loader)  # Lightning does so before it restores anything
    batches = iter(loader)
    assert (cursor.epoch, cursor.position) == (0, 0)
    positions = []
    for _ in range(4):
        next(batches)
        positions.append((cursor.position, cursor.before))
    assert positions == [(0, (0, 0)), (4, (0, 0)), (4, (0, 4)), (8, (0, 4))]  # whole optimizer steps of 4 samples


def test_what_the_thread_raises_is_raised_here() -> None:
    def failing() -> Any:
        yield 1
        raise OSError("the disk is gone")

    items = prefetched(failing)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def module(path: Path | str | None, **options: Any) -> TokenDataModule:
    return TokenDataModule(
        **{"path": None if path is None else str(path), "batch_size": 2, "block_size": 16, **options}
    )


def fake_trainer(**values: Any) -> Any:
    return SimpleNamespace(
        **{"world_size": 4, "global_rank": 0, "accumulate_grad_batches": 1, "limit_val_batches": 1, **values}
    )


def test_prepares_its_source_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 400)
    data = module(tmp_path / "shards", source=str(tmp_path / "text.txt"), tokenizer="char", val_split="tail:0.1")
    data.prepare_data()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    data.prepare_data()
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    data.setup("fit")
    assert data.tokenizer is not None
    text = data.tokenizer.decode(next(iter(data.train_dataloader()))[0][0].tolist())
    assert text in "To be, or not to be, that is the question. " * 3


def test_a_test_split_or_else_the_validation_split(tmp_path: Path) -> None:
    data = module(make_folder(tmp_path))
    data.setup("test")
    assert len(data.test_dataloader()) == 4
    index = ShardIndex.from_json((tmp_path / "index.json").read_bytes(), "")
    (tmp_path / "val_000000.bin").rename(tmp_path / "test_000000.bin")
    (tmp_path / "index.json").write_text(index.to_json().replace("val_0", "test_0"))
    data = module(tmp_path)
    data.setup("test")
    assert len(data.test_dataloader()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 2000}, "train split has 2000 tokens, fewer than one block of 2000"),
        ({"block_size": 100}, "val split has 100 tokens, fewer than one block of 100"),
        ({"batch_size": 125}, "fewer than an optimizer step's 125"),
        ({"tokenizer": "char"}, "holds shards of the tokenizer byte, not char"),
        ({"tokenizer": "bpe:300"}, "not bpe:300"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(make_folder(tmp_path), **options).setup("fit")


def test_more_refusals(tmp_path: Path) -> None:
    for name in ("batch_size", "block_size", "cache_gb"):
        with pytest.raises(UserError, match=f"data.{name}=0 must be positive"):
            module(tmp_path, **{name: 0})
    with pytest.raises(UserError, match=r"no data: give --data.path"):
        module(None).prepare_data()
    with pytest.raises(UserError, match=r"has no token shards: give --data.source"):
        module(tmp_path / "nowhere").prepare_data()
    data = module(make_folder(tmp_path / "a"), batch_size=6)
    data.trainer = fake_trainer(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with pytest.raises(UserError, match=r"batch_size=6 can't be divided among 4 ranks: take 8"):
        data.setup("fit")
    get_tokenizer("byte").save(make_folder(tmp_path / "b") / "tokenizer.json")
    text = (tmp_path / "b" / "index.json").read_text()
    (tmp_path / "b" / "index.json").write_text(text.replace(get_tokenizer("byte").hash, "0" * 64))
    with pytest.raises(UserError, match=r"tokenizer.json is not the one"):
        module(tmp_path / "b").setup("fit")


def test_ids_above_the_vocabulary(tmp_path: Path) -> None:
    """A public set read with the wrong tokenizer: the first bad id is named, not a crash in the embedding."""
    for split in ("train", "val"):
        np.full(500, 60_000, "<u2").tofile(tmp_path / f"{split}.bin")
    data = module(tmp_path, tokenizer="byte")
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(UserError, match="is id 60000, but the vocabulary ends at 256"):
            next(iter(loader))


def test_a_vocabulary_in_a_pickle_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    data = module(tmp_path)
    data.setup("fit")
    assert data.tokenizer is None and "meta.pkl" in capsys.readouterr().err
    assert len(list(data.train_dataloader())) == 2


def test_no_validation_data_is_needed_where_none_is_asked_for(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "train.bin")
    data = module(tmp_path, tokenizer="byte")
    with pytest.raises(UserError, match="no val shards"):
        data.setup("fit")
    data.trainer = fake_trainer(
        limit_val_batches=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    data.setup("fit")


def test_shards_whose_tokenizer_is_lost_are_not_taken_for_anothers(tmp_path: Path) -> None:
    """The hash in the index was compared only where there was a tokenizer.json."""
    (tmp_path / "x.txt").write_text("to be or not to be\n" * 50)
    prepare(str(tmp_path / "x.txt"), tmp_path / "out", "byte")
    (tmp_path / "out/tokenizer.json").unlink()
    other = Tokenizer.build("other", "(?s:.)", get_tokenizer("byte").ranks, {})
    with pytest.raises(UserError, match=r"its tokenizer.json is missing, .* are of byte, not of other"):
        TokenDataModule(str(tmp_path / "out")).load_tokenizer(other)
    named = TokenDataModule(str(tmp_path / "out"), tokenizer="byte")
    named.load_tokenizer()
    assert named.tokenizer is not None and named.tokenizer.name == "byte"
