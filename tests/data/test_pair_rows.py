"""Rows of whole pairs: each pair once and in one row, its answers as targets, and the figures of its reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chatting import chat_bytes
from pairing import prepare_pairs, some_pairs

from lit_gpt.batch import IGNORE_INDEX, PairBatch
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.loader import RankShare
from lit_gpt.data.masks import COUNTS, mask_index
from lit_gpt.data.pair_rows import PairRows
from lit_gpt.data.row_loader import RowEvalLoader
from lit_gpt.data.shard_folder import load_index, open_tokens
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError
from lit_gpt.model.documents import DocumentMasks

BLOCK = 64
PAIRS = some_pairs(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "out"
    prepare_pairs(folder, PAIRS)
    return folder


def open_rows(folder: Path, split: str = "train", block_size: int = BLOCK, seed: int = 3) -> PairRows:
    marks = TokenStream(mask_index(load_index(folder)), split, lambda shard: folder / shard.name, local=True)
    return PairRows(open_tokens(folder, split), marks, block_size, seed)


def pairs_of(batch: PairBatch) -> dict[int, tuple[str, str, str]]:
    """Number of each pair in a batch → the text of the whole chosen conversation, and both answers that count."""
    tokenizer, found = chat_bytes(), {}
    for row in range(len(batch.idx)):
        for slot, number in enumerate(batch.numbers[row].tolist()):
            inside = [batch.documents[row] == 2 * slot + side for side in (0, 1)]
            if number < 0:
                assert not any(mask.any() for mask in inside)
                continue
            counted = [mask & (batch.targets[row] != IGNORE_INDEX) for mask in inside]
            targets = [batch.targets[row][mask].tolist() for mask in counted]
            assert all(ids[-1] == tokenizer.specials["<|im_end|>"] for ids in targets)
            answers = [tokenizer.decode(ids[:-1]) for ids in targets]
            assert number not in found
            found[number] = tokenizer.decode(batch.idx[row][inside[0]].tolist()), answers[0], answers[1]
            for mask in inside:  # the target of the last token would be of another conversation
                assert batch.targets[row][mask][-1] == IGNORE_INDEX
                assert torch.equal(mask.nonzero()[:, 0].diff(), torch.ones(int(mask.sum()) - 1, dtype=torch.int64))
    return found


@pytest.mark.slow
def test_every_pair_once_in_one_row_with_its_answers_as_targets(folder: Path) -> None:
    rows = open_rows(folder)
    batch = rows.read(range(len(rows)), len(rows), pin=False)
    assert batch.idx.shape == batch.targets.shape == batch.documents.shape == (len(rows), 2 * BLOCK)
    found = pairs_of(batch)
    assert sorted(found) == list(range(len(found)))
    wanted = {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in PAIRS}
    for text, chosen, rejected in found.values():
        prompt = text.removeprefix("user\n").partition("\nassistant\n")[0]
        wanted.remove((prompt, chosen, rejected))
    held_out = open_rows(folder, "val")
    assert len(wanted) == len(pairs_of(held_out.read(range(len(held_out)), len(held_out), pin=False)))
    assert rows.padding == pytest.approx(1 - int((batch.documents >= 0).sum()) / batch.idx.numel())
    assert f"{len(found):,} pairs in {len(rows):,} rows of {2 * BLOCK}" in rows.report and "left out" not in rows.report


def test_targets_are_the_next_tokens(folder: Path) -> None:
    rows = open_rows(folder)
    batch = rows.read([0, 1], 2, pin=False)
    counted = batch.targets[:, :-1] != IGNORE_INDEX
    assert counted.any()
    assert torch.equal(batch.targets[:, :-1][counted], batch.idx[:, 1:][counted])
    assert (batch.targets[:, -1] == IGNORE_INDEX).all()
    total = int((rows._marks.read(0, len(rows.tokens)) & COUNTS).sum())
    every = rows.read(range(len(rows)), len(rows), pin=False)
    assert int((every.targets != IGNORE_INDEX).sum()) == total


def test_no_stretch_is_longer_than_the_context(folder: Path) -> None:
    """Each has positions from 0, padding too, and a model knows none beyond its context."""
    rows = open_rows(folder)
    batch = rows.read(range(len(rows)), len(rows) + 1, pin=False)
    assert int(DocumentMasks(batch.documents).positions.max()) < BLOCK
    assert ((batch.documents >= 0).sum(1) < BLOCK).any()


def test_batch_has_the_reference_of_its_pairs(folder: Path) -> None:
    rows = open_rows(folder)
    assert rows.read([0], 1, pin=False).reference.isnan().all()
    rows.reference[:] = np.arange(rows.reference.size).reshape(-1, 2)
    batch = rows.read([2, 0], 3, pin=False)
    present = batch.numbers >= 0
    assert present.any() and not present[2].any()
    expected = torch.stack([2 * batch.numbers, 2 * batch.numbers + 1], -1)
    assert torch.equal(batch.reference[present].long(), expected[present])
    assert batch.reference[~present].isnan().all()


def test_all_ranks_together_have_every_pair_once(folder: Path) -> None:
    rows = open_rows(folder)
    numbers = [
        number
        for rank in range(3)
        for batch in RowEvalLoader(rows, RankShare(2, 3, rank))
        for number in batch.numbers[batch.numbers >= 0].tolist()  # type: ignore[attr-defined]
    ]
    assert sorted(numbers) == list(range(len(rows.reference)))


def test_pair_that_is_longer_than_the_context_is_left_out_and_counted(tmp_path: Path) -> None:
    long = {"prompt": "x", "chosen": "y" * 80, "rejected": "n"}
    prepare_pairs(tmp_path / "out", [*some_pairs(20), long, *some_pairs(20, seed=1)], val_split="tail:0")
    rows = open_rows(tmp_path / "out")
    assert "; 1 longer than the context of 64 are left out" in rows.report
    found = pairs_of(rows.read(range(len(rows)), len(rows), pin=False))
    assert len(found) == 40 and 20 not in found and max(found) == 40
    with pytest.raises(UserError, match="no pair fits into a context of 8 tokens; raise block_size"):
        open_rows(tmp_path / "out", block_size=8)


def test_data_module_gives_pairs_shuffled_and_resumes_to_the_next(folder: Path) -> None:
    def module() -> TokenDataModule:
        data = TokenDataModule(str(folder), format="pairs", batch_size=3, block_size=BLOCK)
        data.setup("fit")
        return data

    whole = module()
    assert set(whole.pairs) == {"train", "val"}
    batches = [batch.numbers for batch in whole.train_dataloader()]  # type: ignore[attr-defined]
    first = module()
    loader = iter(first.train_dataloader())
    for expected in batches[:2]:
        assert torch.equal(next(loader).numbers, expected)  # type: ignore[attr-defined]
    second = module()
    second.load_state_dict(first.state_dict())
    loader = iter(second.train_dataloader())
    for expected in batches[2:]:
        assert torch.equal(next(loader).numbers, expected)  # type: ignore[attr-defined]
    for batch in whole.val_dataloader():
        assert isinstance(batch, PairBatch)


def test_prompts_are_those_of_the_first_pairs(folder: Path) -> None:
    data = TokenDataModule(str(folder), format="pairs", block_size=BLOCK)
    data.setup("validate")
    prompts = [chat_bytes().decode(ids) for ids in data.example_prompts(3)]
    assert len(set(prompts)) == 3
    assert all(prompt.endswith("?\nassistant\n") for prompt in prompts)


def test_attention_across_pairs_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="attend_across is for conversations, not for pairs"):
        TokenDataModule(str(folder), format="pairs", attend_across=True)
