"""Rows of conversations: every counted token once, the same rows on any number of ranks, resumed to the exact one."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chatting import as_openai, chat_bytes, prepare_chat, some_conversations, write_lines

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.data.conversation_rows import ConversationRows
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.loader import Cursor, RankShare
from lit_gpt.data.masks import COUNTS, mask_index
from lit_gpt.data.prepare import prepare
from lit_gpt.data.remote import RemoteFolder
from lit_gpt.data.row_loader import RowEvalLoader, RowTrainLoader, shuffle_rows
from lit_gpt.data.shard_folder import load_index, open_tokens
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError

BLOCK = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "out"
    prepare_chat(folder, some_conversations(150, most_turns=2))
    return folder


def open_rows(folder: Path, split: str = "train", block_size: int = BLOCK, **options: Any) -> ConversationRows:
    marks = TokenStream(mask_index(load_index(folder)), split, lambda shard: folder / shard.name, local=True)
    return ConversationRows(open_tokens(folder, split), marks, block_size, **{"seed": 3, **options})


def pairs(batch: Batch) -> Counter[tuple[int, int]]:
    """(id, target) of everything that counts."""
    counted = batch.targets != IGNORE_INDEX
    return Counter(zip(batch.idx[counted].tolist(), batch.targets[counted].tolist()))


def wanted_pairs(rows: ConversationRows) -> Counter[tuple[int, int]]:
    """The same, straight from the conversations."""
    found: Counter[tuple[int, int]] = Counter()
    for row in range(len(rows)):
        for start, length in rows.documents(row):
            ids = rows.tokens.read(start, length).tolist()
            counts = (rows._marks.read(start, length) & COUNTS).tolist()
            found.update((ids[at - 1], ids[at]) for at in range(1, length) if counts[at])
    return found


@pytest.mark.slow
def test_rows_hold_every_conversation_once_and_begin_with_one(folder: Path) -> None:
    rows = open_rows(folder)
    spans = [span for row in range(len(rows)) for span in rows.documents(row)]
    position = 0
    for start, length in sorted(spans):
        assert start == position
        position += length
    assert position == len(rows.tokens)
    assert len(spans) == rows.conversations == sum(shard.documents for shard in load_index(folder).split("train"))
    assert rows.padding < 0.05
    assert f"{rows.conversations:,} conversations" in rows.report and "longer" not in rows.report


def test_a_batch_has_the_targets_of_its_conversations_and_their_numbers(folder: Path) -> None:
    rows = open_rows(folder)
    batch = rows.read([0, len(rows) - 1], 3, pin=False)
    assert batch.idx.shape == batch.targets.shape == (3, BLOCK)
    assert batch.documents is not None and batch.documents.shape == (3, BLOCK)
    assert not batch.idx[2].any() and (batch.targets[2] == IGNORE_INDEX).all()
    for number, row in enumerate([0, len(rows) - 1]):
        end = 0
        for document, (start, length) in enumerate(rows.documents(row)):
            ids = rows.tokens.read(start, length).tolist()
            here = slice(end, min(end + length, BLOCK))
            assert batch.idx[number, here].tolist() == ids[: BLOCK - end]
            assert set(batch.documents[number, here].tolist()) <= {document}
            if end:
                assert batch.targets[number, end - 1] == IGNORE_INDEX  # the next one's first token
            end += length
        assert (batch.targets[number, max(end - 1, 0) :] == IGNORE_INDEX).all()
        assert set(batch.documents[number, end:].tolist()) <= {document + 1}
    assert open_rows(folder, attend_across=True).read([0], 1, False).documents is None


@pytest.mark.parametrize(("rows", "ranks"), [(1, 1), (3, 1), (2, 3), (4, 8)])
def test_validation_counts_every_answer_once(folder: Path, rows: int, ranks: int) -> None:
    opened = open_rows(folder, "val")
    found: Counter[tuple[int, int]] = Counter()
    loaders = [RowEvalLoader(opened, RankShare(rows, ranks, rank)) for rank in range(ranks)]
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) == len(loaders[0])
        for batch in batches:
            assert batch.idx.shape == (rows, BLOCK)
            found += pairs(batch)
    assert found == wanted_pairs(opened)


def test_an_epoch_has_every_row_once_on_any_number_of_ranks(folder: Path) -> None:
    rows = open_rows(folder)
    step, per_step = 4, []
    for ranks, accumulate in [(1, 1), (1, 4), (2, 2), (4, 1)]:
        shares = [RankShare(step // ranks // accumulate, ranks, rank, accumulate) for rank in range(ranks)]
        loaders = [RowTrainLoader(rows, shuffle_rows(rows, 5), Cursor(), share) for share in shares]
        batches = [list(loader) for loader in loaders]
        steps = len(batches[0]) // accumulate
        assert steps == len(rows) // step
        per_step.append([
            sorted(
                tuple(row)
                for some in batches
                for batch in some[at * accumulate : (at + 1) * accumulate]
                for row in batch.idx.tolist()
            )
            for at in range(steps)
        ])  # fmt: skip
    assert all(each == per_step[0] for each in per_step)
    seen = [row for some in per_step[0] for row in some]
    assert len(set(seen)) == len(seen) == len(rows) // step * step
    other = list(RowTrainLoader(rows, shuffle_rows(rows, 5), Cursor(1, 0), RankShare(4)))
    assert sorted(tuple(row) for row in other[0].idx.tolist()) != per_step[0][0]


# ---------------------------------------------------------------- longer than the context


def test_a_long_conversation_is_cut_after_turns_counted_and_reported(folder: Path) -> None:
    whole, small = open_rows(folder), open_rows(folder, block_size=64)
    assert "longer than the context of 64, cut after turns into" in small.report
    spans = sorted(span for row in range(len(small)) for span in small.documents(row))
    assert all(length <= 65 for _, length in spans)
    kept = sum(length for _, length in spans)
    assert kept <= len(whole.tokens)
    if kept < len(whole.tokens):
        assert f"{len(whole.tokens) - kept:,} tokens fit into none" in small.report
    found: Counter[tuple[int, int]] = Counter()
    for batch in RowEvalLoader(small, RankShare(4)):
        found += pairs(batch)
    assert found == wanted_pairs(small)
    assert found <= wanted_pairs(whole)
    with pytest.raises(UserError, match="no answer fits into a context of 2 tokens; raise block_size"):
        open_rows(folder, block_size=2)


# ---------------------------------------------------------------- the data module


def module(folder: Path, **options: Any) -> TokenDataModule:
    data = TokenDataModule(str(folder), **{"format": "chat", "block_size": BLOCK, "batch_size": 2, **options})
    data.setup("fit")
    return data


def take(batches: Iterator[Batch], count: int) -> list[list[list[int]]]:
    return [next(batches).idx.tolist() for _ in range(count)]


def test_a_resumed_run_goes_on_with_the_very_next_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = module(folder)
    assert "train: " in capsys.readouterr().err
    steps = len(data.train_dataloader())
    assert steps > 4
    wanted = take(iter(data.train_dataloader()), steps)
    wanted += take(iter(data.train_dataloader()), steps)  # the next epoch
    first = module(folder)
    batches = iter(first.train_dataloader())
    assert take(batches, 3) == wanted[:3]
    second = module(folder)
    second.load_state_dict(first.state_dict())
    assert take(iter(second.train_dataloader()), steps - 1) == wanted[3 : steps + 2]  # across the epoch's edge
    third = module(folder)
    third.load_state_dict(second.state_dict())
    assert take(iter(third.train_dataloader()), 2) == wanted[steps + 2 : steps + 4]


@pytest.mark.slow
def test_a_checkpoint_of_other_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    state = module(folder).state_dict()
    for options, says in (({"seed": 9}, "data.seed"), ({"block_size": 200}, "data.block_size")):
        with pytest.raises(UserError, match=says):
            module(folder, **options).load_state_dict(state)
    other = some_conversations(150, seed=1, most_turns=2)
    prepare_chat(tmp_path / "other", other)
    with pytest.raises(UserError, match="training tokens are not those"):
        module(tmp_path / "other").load_state_dict(state)


def test_folders_and_options_of_the_other_format(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text\n" * 500)
    prepare(str(tmp_path / "x.txt"), tmp_path / "text", "byte")
    with pytest.raises(UserError, match=r"holds shards of format chat, not text: .* --data.format chat"):
        module(folder, format="text")
    with pytest.raises(UserError, match="holds shards of format text, not chat"):
        module(tmp_path / "text")
    with pytest.raises(UserError, match="attend_across is for conversations"):
        TokenDataModule(str(folder), attend_across=True)
    with pytest.raises(UserError, match="shuffle_tokens is for text"):
        TokenDataModule(str(folder), format="chat", shuffle_tokens=5)
    with pytest.raises(UserError, match="fewer than an optimizer step's 5000"):
        module(folder, batch_size=5000)
    with pytest.raises(UserError, match="holds shards of the tokenizer"):
        module(folder, tokenizer=str(_other_tokenizer(tmp_path)))


def _other_tokenizer(folder: Path) -> Path:
    from lit_gpt.tokenizer.train import train_tokenizer

    train_tokenizer("char", ["狐狸"]).save(folder / "char.json")
    return folder / "char.json"


def test_a_source_that_has_changed_is_not_trained_on_as_it_was(tmp_path: Path) -> None:
    """Whoever edits the file and runs the command again gets the edited file, or a refusal."""
    conversations = some_conversations(30)
    prepare_chat(tmp_path / "out", conversations)
    source = tmp_path / "out.jsonl"
    again = partial(TokenDataModule, str(tmp_path / "out"), str(source), "byte", format="chat")
    again().prepare_data()
    write_lines(source, map(as_openai, conversations[:-1]))
    with pytest.raises(UserError, match=r"or of what it was before it was changed: .* --data.source null"):
        again().prepare_data()
    source.unlink()
    again().prepare_data()  # not needed any more
    TokenDataModule(str(tmp_path / "out"), format="chat").prepare_data()
    with pytest.raises(UserError, match="stdlib is text"):
        TokenDataModule(str(tmp_path / "out"), "stdlib", format="chat").prepare_data()


def test_prompts_are_the_first_questions(folder: Path) -> None:
    data = module(folder)
    prompts = data.example_prompts(3)
    assert len(prompts) == 3
    tokenizer = chat_bytes()
    begin = tokenizer.specials["<|im_start|>"]
    for ids in prompts:
        assert ids[0] == begin
        assert tokenizer.decode(ids).endswith("assistant\n")
    assert TokenDataModule(str(folder)).example_prompts(3) == []


# ---------------------------------------------------------------- behind an address


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_folder_at_an_address(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.data.remote.ATTEMPTS", 1)
    served = Path(shutil.copytree(folder, tmp_path / "served"))
    handler = partial(QuietHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        remote = module(url, cache_dir=str(tmp_path / "cache"))
        here = module(folder)
        count = len(here.train_dataloader())
        assert take(iter(remote.train_dataloader()), count) == take(iter(here.train_dataloader()), count)
        assert remote._identity()["fingerprint"] == here._identity()["fingerprint"]
        cache = RemoteFolder(url, str(tmp_path / "cache")).folder
        assert len(list(cache.glob("*.mask"))) == 2 and len(list(cache.glob("train_*.bin"))) == 1
        data = bytearray((served / "train_000000.mask").read_bytes())
        data[-1] ^= COUNTS
        (served / "train_000000.mask").write_bytes(data)
        with pytest.raises(UserError, match=r"train_000000.mask: .*sha256"):
            module(url, cache_dir=str(tmp_path / "other"))
        server.shutdown()
