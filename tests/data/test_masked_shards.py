"""Folders of conversations: tokens and masks are the template's, a killed preparation goes on, damage is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chatting import as_openai, chat_bytes, prepare_chat, some_conversations, write_lines
from preparing import CODE, die_at, files, in_a_child, write

from lit_gpt.__main__ import main
from lit_gpt.data import prepare as module
from lit_gpt.data import write_shards
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.inspect_shards import check, show
from lit_gpt.data.masks import BEGINS, COUNTS, find_documents, marks_of, mask_index
from lit_gpt.data.prepare import prepare
from lit_gpt.data.shard_folder import load_index, open_tokens
from lit_gpt.data.shards import write_shard
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import ChatTemplate

CONVERSATIONS = some_conversations(60)
FEW = CONVERSATIONS[:24]


def open_marks(folder: Path, split: str) -> TokenStream:
    return TokenStream(mask_index(load_index(folder)), split, lambda shard: folder / shard.name, local=True)


def documents(folder: Path, split: str) -> list[tuple[list[int], list[bool]]]:
    """(ids, counts) of each conversation of a split."""
    tokens, marks = open_tokens(folder, split), open_marks(folder, split)
    starts, lengths = find_documents(marks)
    return [
        (tokens.read(start, length).tolist(), (marks.read(start, length) & COUNTS).astype(bool).tolist())
        for start, length in zip(starts.tolist(), lengths.tolist())
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "out"
    prepare_chat(folder, CONVERSATIONS)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "out"))


@pytest.mark.slow
def test_tokens_and_masks_are_the_templates(prepared: Path) -> None:
    template = ChatTemplate(chat_bytes())
    try:
        wanted = [tuple(template.encode(messages)) for messages in CONVERSATIONS]
    finally:
        template.close()
    found = documents(prepared, "train") + documents(prepared, "val")
    assert sorted(found) == sorted(wanted)
    index = load_index(prepared)
    assert (index.format, index.format_version, index.eot_position) == ("chat", 2, None)
    assert sum(shard.documents for shard in index.shards) == 60
    assert index.tokenizer_hash == chat_bytes().hash
    assert check(str(prepared)) == index


def test_what_counts_is_shown(prepared: Path) -> None:
    lines = list(show(str(prepared)))
    assert any("⟦" in line and "<|im_end|>⟧" in line for line in lines)
    assert all(line.count("⟦") == line.count("⟧") == line.count("<|im_start|>assistant") for line in lines[1::2])
    assert all("count ──" in line for line in lines[::2])


@pytest.mark.parametrize("val_split", ["tail:0.3", "hash:0.3", "auto"])
def test_no_conversation_is_cut_by_the_split(val_split: str, tmp_path: Path, prepared: Path) -> None:
    prepare_chat(tmp_path / "out", CONVERSATIONS, val_split=val_split)
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert sorted(found) == sorted(documents(prepared, "train") + documents(prepared, "val"))
    assert len(documents(tmp_path / "out", "val")) >= 5


def test_the_same_conversation_in_two_forms_is_in_one_split(tmp_path: Path) -> None:
    pairs = [(f"question {number}", f"answer {number}") for number in range(40)]
    openai = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    alpaca = [{"instruction": q, "output": a} for q, a in pairs]
    write_lines(tmp_path / "in" / "a.jsonl", openai)
    write_lines(tmp_path / "in" / "b.jsonl", alpaca)
    write(tmp_path / "in" / "README.md", "not read")
    prepare(str(tmp_path / "in"), tmp_path / "out", "byte", val_split="hash:0.3", data_format="chat", workers=1)
    for split in ("train", "val"):
        found = documents(tmp_path / "out", split)
        assert len(found) and all(found.count(each) == 2 for each in found)


# ---------------------------------------------------------------- resuming


@pytest.mark.slow
def test_killed_at_every_file_it_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_shards, "JOB_CHARACTERS", 500)
    prepare_chat(tmp_path / "reference", FEW, shard_tokens=1500)
    (tmp_path / "reference.jsonl").rename(tmp_path / "out.jsonl")
    source = tmp_path / "out.jsonl"

    def run(call: int, before: bool) -> None:
        die_at(call, before)
        prepare(str(source), tmp_path / "out", "byte", "text", "hash:0.2", 1, 1500, data_format="chat")

    kills = next(kills for kills in range(60) if not in_a_child(partial(run, 1 + kills // 2, kills % 2 == 0)))
    assert kills > 8
    ours, theirs = files(tmp_path / "out"), files(tmp_path / "reference")
    assert {name: ours[name] for name in ours if name != "prepare.json"} == {
        name: theirs[name] for name in theirs if name != "prepare.json"
    }
    assert len([name for name in ours if name.endswith(".mask")]) >= 4
    check(str(tmp_path / "out"))


@pytest.mark.slow
def test_a_finished_mask_that_was_changed_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_shards, "JOB_CHARACTERS", 500)
    source = write_lines(tmp_path / "c.jsonl", map(as_openai, CONVERSATIONS))
    again = partial(prepare, str(source), tmp_path / "out", "byte", "text", "hash:0.2", 1, 1500, data_format="chat")

    def run() -> None:
        die_at(9, before=True)
        again()

    assert in_a_child(run) == signal.SIGKILL
    mask = tmp_path / "out/train_000000.mask"
    data = bytearray(mask.read_bytes())
    data[-1] ^= COUNTS
    mask.write_bytes(data)
    with pytest.raises(UserError, match=r"a finished shard was changed: .*train_000000.mask: sha256 is"):
        again()
    mask.unlink()
    with pytest.raises(UserError, match=r"a finished shard was changed: .*train_000000.mask"):
        again()
    again(overwrite=True)
    check(str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_any_number_of_workers_writes_the_same_bytes(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(write_shards, "JOB_CHARACTERS", 500)
    before = files(prepared)
    source = prepared.with_name("out.jsonl")
    prepare(str(source), prepared.with_name("other"), "byte", "text", "hash:0.2", 2, data_format="chat")
    ours = files(prepared.with_name("other"))
    assert {name: digest for name, digest in ours.items() if name != "prepare.json"} == {
        name: digest for name, digest in before.items() if name != "prepare.json"
    }
    bad = write_lines(prepared.with_name("bad.jsonl"), [as_openai(CONVERSATIONS[0])] * 50 + [{"instruction": "q"}])
    with pytest.raises(UserError, match=r'bad.jsonl: line 51: "output" is missing'):
        prepare(str(bad), prepared.with_name("bad"), "byte", "text", "hash:0.2", 2, data_format="chat")


def test_the_same_again_is_nothing_to_do_and_another_file_is_refused(folder: Path, prepared: Path) -> None:
    source = str(prepared.with_name("out.jsonl"))
    again = partial(prepare, source, folder, "byte", val_split="hash:0.2", workers=1)
    before = files(folder)
    again(data_format="chat")
    assert files(folder) == before
    with pytest.raises(UserError, match="already holds shards made otherwise"):
        again(data_format="text")


def test_overwriting_with_text_leaves_no_masks(folder: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "x.txt", CODE * 99)
    prepare(str(text), folder, "byte", overwrite=True)
    assert not list(folder.glob("*.mask"))
    assert load_index(folder).format == "text"


# ---------------------------------------------------------------- the index


def test_an_index_of_text_says_nothing_of_masks(tmp_path: Path, folder: Path) -> None:
    """Its bytes are what they were, so that earlier programs read it; that of conversations they refuse."""
    prepare(str(write(tmp_path / "x.txt", CODE * 99)), tmp_path / "text", "byte")
    text = json.loads((tmp_path / "text/index.json").read_text())
    assert text["format_version"] == 1
    assert not {"format", "template_sha256"} & set(text)
    assert all("mask_sha256" not in shard for shard in text["shards"])
    index = load_index(folder)
    assert ShardIndex.from_json(index.to_json().encode(), "") == index
    assert json.loads(index.to_json())["format_version"] == 2


# ---------------------------------------------------------------- damage


def change_byte(path: Path, position: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)


def change_index(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "index.json").read_text())
    for key, value in changes.items():
        (values["shards"][0] if key == "mask_sha256" else values)[key] = value
    (folder / "index.json").write_text(json.dumps(values))
    (folder / "prepare.json").unlink()


def rewrite_mask(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    """Another mask of the training shard, with a hash that fits."""
    marks = open_marks(folder, "train")
    found = marks.read(0, len(marks)).copy()
    change(found)
    with write_shard(folder / "train_000000.mask", "uint8") as writer:
        writer.add(found)
    change_index(folder, mask_sha256=writer.shard.sha256)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: (path / "train_000000.mask").unlink(), "the loss mask is missing"),
    "a folder": (
        lambda path: ((path / "train_000000.mask").unlink(), (path / "train_000000.mask").mkdir()),
        "cannot be read",
    ),
    "cut": (
        lambda path: (path / "train_000000.mask").write_bytes((path / "train_000000.mask").read_bytes()[:-5]),
        "truncated or damaged",
    ),
    "another's": (
        lambda path: shutil.copy(path / "val_000000.mask", path / "train_000000.mask"),
        r"says \(dtype, tokens, bytes\)",
    ),
    "tokens": (lambda path: shutil.copy(path / "train_000000.bin", path / "train_000000.mask"), "not a loss mask"),
    "no hash": (lambda path: change_index(path, mask_sha256=""), "the hashes of its tokens and its mask"),
    "no template": (lambda path: change_index(path, template_sha256=None), "template_sha256 null is no hash"),
    "format": (lambda path: change_index(path, format=["chat"]), "format .* is no name"),
    "version": (lambda path: change_index(path, format_version=1), "the hashes of its tokens and its mask"),
    "newer": (lambda path: change_index(path, format_version=3), "is newer than this program's"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_before_any_work(folder: Path, name: str) -> None:
    damage, says = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=says) as refused:
        load_index(folder)
    assert "\n" not in str(refused.value)


def test_check_finds_a_flipped_bit_and_training_an_impossible_one(folder: Path) -> None:
    path = folder / "train_000000.mask"
    change_byte(path, 1024 + 3, path.read_bytes()[1024 + 3] ^ COUNTS)
    load_index(folder)
    with pytest.raises(UserError, match=r"train_000000.mask: sha256 is .* damaged"):
        check(str(folder))
    change_byte(path, 1024 + 5, 77)
    with pytest.raises(UserError, match=r"train_000000.mask: byte 77 at token 5 is no part of a mask"):
        find_documents(open_marks(folder, "train"))


def test_masks_of_other_documents_are_found(folder: Path) -> None:
    def merge(marks: np.ndarray) -> None:
        marks[np.flatnonzero(marks & BEGINS)[1]] ^= BEGINS

    rewrite_mask(folder, merge)
    with pytest.raises(UserError, match=r"index.json says \d+ documents, its tokens are \d+"):
        check(str(folder))


def test_a_shard_begins_with_a_document(folder: Path) -> None:
    def clear(marks: np.ndarray) -> None:
        marks[0] ^= BEGINS

    rewrite_mask(folder, clear)
    with pytest.raises(UserError, match="its first token begins no document"):
        find_documents(open_marks(folder, "train"))
    with pytest.raises(UserError, match="its first token begins no document"):
        check(str(folder))


def test_another_template_beside_the_shards_is_refused(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["chat_template"] = values["chat_template"].replace("user", "human")
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="its chat template has sha256"):
        check(str(folder))
    with pytest.raises(UserError, match="its chat template has sha256"):
        TokenDataModule(str(folder), format="chat").load_tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="which has the chat template: put it back"):
        TokenDataModule(str(folder), format="chat").load_tokenizer()


# ---------------------------------------------------------------- bad input


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown role": (
        {"messages": [{"role": "robot", "content": "a"}]},
        r"c.jsonl: line 2: message 1 has the unknown role 'robot'",
    ),
    "nothing to learn": (
        {"messages": [{"role": "user", "content": "a"}]},
        "c.jsonl: line 2 has no turn of the assistant",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    bad, says = BAD[name]
    source = write_lines(tmp_path / "c.jsonl", [as_openai(CONVERSATIONS[0]), bad])
    for val_split in ("auto", "hash:0.1"):
        with pytest.raises(UserError, match=says):
            prepare(str(source), tmp_path / "out", "byte", val_split=val_split, data_format="chat", workers=1)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_template_refuses_names_file_and_line(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BYTES_PER_WORKER", 1)
    tokenizer = chat_bytes()
    strict = tokenizer.to_dict()
    strict["chat_template"] = "{{ raise_exception('begin with the user') if messages[0].role != 'user' }}" + str(
        strict["chat_template"]
    )
    (tmp_path / "t.json").write_text(json.dumps(strict))
    turns = [{"role": "assistant", "content": "a"}]
    source = write_lines(tmp_path / "c.jsonl", [as_openai(CONVERSATIONS[1]), {"messages": turns}])
    with pytest.raises(UserError, match=r"c.jsonl: line 2: the chat template refuses .*begin with the user"):
        prepare(str(source), tmp_path / "out", str(tmp_path / "t.json"), data_format="chat", workers=workers)
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[list[str], str]] = {
    "trained": (["c.jsonl", "--tokenizer", "bpe:300"], "would be made from the text of conversations"),
    "text field": (["c.jsonl", "--text_field", "body"], "text_field body is for text"),
    "stdlib": (["stdlib"], "stdlib is text, not conversations: name files of them, or stdlib-chat"),
    "no such file": (["d.jsonl"], 'no file or folder "d.jsonl": did you mean "c.jsonl"'),
    "an array": (["a.json"], "a file of one JSON value: make it lines with jq"),
    "a folder of texts": (["texts"], r"no text files in this folder \(such as .jsonl, .ndjson\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_of_other_formats(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "c.jsonl", [as_openai(CONVERSATIONS[0])])
    write(tmp_path / "a.json", "[]")
    write(tmp_path / "texts/a.txt", "text")
    words, says = REFUSED[name]
    words = words if "--tokenizer" in words else [*words, "--tokenizer", "byte"]
    assert main(["prepare", *words, "--format", "chat", "--output", "out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    assert re.search(says, printed.err.splitlines()[-1]), printed.err  # after a bar, where files were read
    assert not (tmp_path / "out").exists()


def test_generated_conversations_are_a_source_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_gpt.data import stdlib_chat

    monkeypatch.setattr(stdlib_chat, "stdlib_conversations", lambda: iter(CONVERSATIONS))
    prepare("stdlib-chat", tmp_path / "out", "byte", val_split="hash:0.2", data_format="chat", workers=1)
    assert len(documents(tmp_path / "out", "train")) + len(documents(tmp_path / "out", "val")) == 60
    assert not (tmp_path / "out/.downloads").exists()
    with pytest.raises(UserError, match="stdlib-chat is made for format chat, not text"):
        prepare("stdlib-chat", tmp_path / "text", "byte")


def test_marks_of_a_document() -> None:
    assert marks_of([False, True, True, False]).tolist() == [BEGINS, COUNTS, COUNTS, 0]
    assert marks_of([True]).tolist() == [BEGINS | COUNTS]
    assert marks_of([]).tolist() == []
