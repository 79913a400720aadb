"""Mixtures: exact proportions at every prefix, the same samples on any number of ranks, resumed to the exact one."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatting import prepare_chat, some_conversations
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.batch import Batch
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.loader import Cursor, RankShare
from lit_gpt.data.mixture import Mixture
from lit_gpt.data.mixture_loader import MixtureOrder, MixtureTrainLoader
from lit_gpt.data.shards import write_shard
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer

BLOCK = 16
WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def mixture_of(weights: list[int]) -> Mixture:
    return Mixture({f"folder {number}": weight for number, weight in enumerate(weights)})


@given(weights=WEIGHTS)
def test_each_folder_has_its_share_of_every_prefix_to_less_than_one_sample(weights: list[int]) -> None:
    mixture = mixture_of(weights)
    folders, numbers = mixture.assign(0, 2 * mixture.period + 5)
    given_so_far = np.cumsum(folders[:, None] == np.arange(len(weights)), axis=0)  # (n, folders) after each sample
    total = sum(weights)
    for folder, weight in enumerate(weights):  # |count - w n| < 1 in whole numbers
        ahead = given_so_far[:, folder] * total - weight * np.arange(1, len(folders) + 1)
        assert np.abs(ahead).max() < total
        assert numbers[folders == folder].tolist() == list(range(int(given_so_far[-1, folder])))


@given(weights=WEIGHTS, position=st.integers(0, 10**12), count=st.integers(0, 50), before=st.integers(0, 50))
def test_a_position_says_which_sample_it_is_without_those_before(
    weights: list[int], position: int, count: int, before: int
) -> None:
    mixture = mixture_of(weights)
    first = max(0, position - before)
    folders, numbers = mixture.assign(first, position - first + count)
    for found, wanted in zip(mixture.assign(position, count), (folders, numbers)):
        assert found.tolist() == wanted[position - first :].tolist()
    exact = [int(weight * Fraction(position, sum(weights))) for weight in weights]
    for folder, number in zip(*mixture.assign(position, 1)):
        assert abs(number - exact[folder]) <= 1


def test_weights_are_the_decimal_numbers_that_were_written() -> None:
    assert Mixture({"a": 0.7, "b": 0.3}).ratio == "7:3"
    assert Mixture({"a": 2, "b": 1.0, "c": 3}).ratio == "2:1:3"
    assert Mixture({"a": 0.1, "b": 0.2, "c": 0.7}).period == 10
    assert Mixture({"a": 1e-3, "b": 0.999}).ratio == "1:999"
    assert Mixture({"a": 5}).ratio == "1"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "data.mixture has no folder"),
        ({"a": 0.5, "b": 0}, "b has weight 0: give a number above 0"),
        ({"a": -1.0}, "a has weight -1.0"),
        ({"a": float("nan")}, "a has weight nan"),
        ({"a": float("inf")}, "a has weight inf"),
        ({"a": "much"}, "a has weight much"),
        ({"a": 1234567, "b": 7654321}, r"8,888,888 samples, .* like {a: 0.139, b: 0.861}"),
    ],
)
def test_weights_that_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(weights)


# ---------------------------------------------------------------- the data module


def make_folder(folder: Path, first: int, tokens: int, tokenizer: Tokenizer | None = None) -> str:
    """A folder whose ids are `first` … `first` + 39 in turn, so that a row says where it is from."""
    tokenizer, shards = tokenizer or get_tokenizer("byte"), []
    for split, count in (("train", tokens), ("val", 40)):
        with write_shard(folder / f"{split}_000000.bin", "uint32") as writer:
            writer.add(first + np.arange(count) % 40)
        shards.append(writer.shard)
    tokenizer.save(folder / "tokenizer.json")
    ShardIndex("uint32", tuple(shards), tokenizer.name, tokenizer.hash, tokenizer.n_vocab).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """20, 5 and 60 samples an epoch, in the proportion 5 : 2 : 1."""
    root = tmp_path_factory.mktemp("mixture")
    sizes = {"a": (0, 20, 0.5), "b": (40, 5, 0.2), "c": (80, 60, 0.1)}
    return {make_folder(root / name, at, size * BLOCK + BLOCK + 1): w for name, (at, size, w) in sizes.items()}


def module(mixture: dict[str, float], **options: Any) -> TokenDataModule:
    values = {"path": next(iter(mixture)), "mixture": mixture, "block_size": BLOCK, "batch_size": 4, **options}
    data = TokenDataModule(**values)
    data.setup("fit")
    return data


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.idx.tolist()]


def test_samples_come_in_proportion_and_each_folder_repeats_at_its_own_pace(folders: dict[str, float]) -> None:
    data = module(folders)
    loader = data.train_dataloader()
    assert isinstance(loader, MixtureTrainLoader) and len(loader) == 85 // 4
    seen: list[tuple[int, ...]] = []
    for _ in range(2):  # Lightning's epochs are no epochs of the folders
        seen += [row for batch in loader for row in rows_of(batch)]
    origin = [row[0] // 40 for row in seen]
    for folder, weight in enumerate((5, 2, 1)):
        counts = np.cumsum(np.array(origin) == folder)
        assert np.abs(8 * counts - weight * np.arange(1, len(seen) + 1)).max() < 8
    alone = TokenDataModule(path=list(folders)[1], block_size=BLOCK, batch_size=1)
    alone.setup("fit")
    wanted = [rows_of(batch)[0] for _ in range(3) for batch in alone.train_dataloader()]  # three epochs of 5
    assert [row for row in seen if row[0] // 40 == 1][:15] == wanted


@pytest.mark.slow
def test_any_number_of_ranks_and_any_resume_take_the_same_samples(folders: dict[str, float]) -> None:
    data = module(folders)
    assert isinstance(data._shuffle, MixtureOrder)
    steps = {}
    for ranks, accumulate in [(1, 1), (1, 4), (2, 2), (4, 1)]:
        shares = [RankShare(4 // ranks // accumulate, ranks, rank, accumulate) for rank in range(ranks)]
        per_rank = [list(MixtureTrainLoader(data._folders, data._shuffle, Cursor(), share)) for share in shares]
        steps[ranks, accumulate] = [
            Counter(row for batches in per_rank for batch in batches[at : at + accumulate] for row in rows_of(batch))
            for at in range(0, len(per_rank[0]), accumulate)
        ]
    assert all(found == steps[1, 1] for found in steps.values())
    first = module(folders)
    batches = iter(first.train_dataloader())
    for _ in range(3):
        next(batches)
    second = module(folders, batch_size=2)  # another batch size goes on with the very next sample, too
    second.load_state_dict(first.state_dict())
    rest = iter(second.train_dataloader())
    again = rows_of(next(rest)) + rows_of(next(rest))
    assert Counter(again) == steps[1, 1][3]
    third = module(folders)
    third.load_state_dict(second.state_dict())
    assert Counter(rows_of(next(iter(third.train_dataloader())))) == steps[1, 1][4]


def test_other_weights_other_folders_and_none_are_refused_on_resume(folders: dict[str, float]) -> None:
    state = module(folders).state_dict()
    a, b, c = folders
    module({a: 5, b: 2, c: 1}).load_state_dict(state)  # the same proportions
    for other, message in [
        ({a: 5, b: 2, c: 2}, "data.mixture gives mixture 5:2:2, the run's is 5:2:1"),
        ({b: 5, a: 2, c: 1}, "its training tokens are not those"),
    ]:
        with pytest.raises(UserError, match=message):
            module(other).load_state_dict(state)
    plain = TokenDataModule(path=a, block_size=BLOCK, batch_size=4)
    plain.setup("fit")
    with pytest.raises(UserError, match=r"data.mixture gives mixture None, the run's is 5:2:1"):
        plain.load_state_dict(state)
    earlier = {name: value for name, value in plain.state_dict().items() if name not in ("rows", "mixture")}
    plain.load_state_dict(earlier)  # of a checkpoint from before there were mixtures
    with pytest.raises(UserError, match=r"data.mixture gives mixture 5:2:1, the run's is None"):
        module(folders).load_state_dict(earlier)


@pytest.mark.slow
def test_a_mixture_of_conversations(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        prepare_chat(tmp_path / name, some_conversations(60, seed=number, most_turns=2))
    mixture = {str(tmp_path / name): 1.0 for name in "ab"}
    data = module(mixture, format="chat", block_size=256)
    batch = next(iter(data.train_dataloader()))
    assert batch.documents is not None and batch.idx.shape == batch.documents.shape == (4, 256)
    known = [{rows_of(loader._rows.read([row], 1, False))[0] for row in range(len(loader._rows))}
             for loader in (folder.samples for folder in data._folders)]  # fmt: skip
    assert [sum(row in rows for row in rows_of(batch)) for rows in known] == [2, 2]


def test_refusals(folders: dict[str, float], tmp_path: Path) -> None:
    path = next(iter(folders))
    gone, other = str(tmp_path / "gone"), make_folder(tmp_path / "other", 0, 400, train_tokenizer("char", ["狐狸"]))
    for mixture, options, message in [
        ({gone: 1.0}, {"path": path}, "gone: no such folder"),
        ({path: 1.0, other: 1.0}, {}, r"other holds shards of the tokenizer char .*, .* of byte .*: prepare .* again"),
        ({path: 1.0}, {"path": None}, "data.mixture is for training: give --data.path too"),
        ({path: 1.0}, {"format": "pairs"}, "not for pairs"),
        ({"https://example.org/x": 1.0}, {}, "https://example.org/x is an address"),
        ({path: 1.0, gone: 0.0}, {}, "gone has weight 0.0"),
        ("a", {"path": path}, "data.mixture='a' names no folders"),
        (folders, {"batch_size": 500}, "data.mixture: the train split has 85 samples of 16 tokens, fewer than"),
    ]:
        with pytest.raises(UserError, match=message):
            module(mixture, **options)  # type: ignore[arg-type]
