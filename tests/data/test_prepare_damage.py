"""prepare trusts nothing that it cannot verify, and throws nothing away that can be gone on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from preparing import CODE, OPTIONS, die_at, files, in_a_child, write

from lit_gpt.data import prepare as module
from lit_gpt.data.inspect_shards import check
from lit_gpt.data.prepare import prepare
from lit_gpt.data.prepare_state import PrepareState, _hash
from lit_gpt.errors import UserError

pytestmark = pytest.mark.usefixtures("small_jobs")


@pytest.fixture(scope="module")
def unfinished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, half prepared: killed when it wrote its second pair of shards."""
    folder = tmp_path_factory.mktemp("unfinished") / "out"

    def run() -> None:
        die_at(7, before=True)
        prepare(str(corpus), folder, **OPTIONS)

    assert in_a_child(run) == signal.SIGKILL
    assert len(json.loads((folder / "prepare.json").read_text())["shards"]) == 2
    return folder


def whole_files(folder: Path) -> dict[str, str]:
    """`files` without what a killed process left half-written."""
    return {name: digest for name, digest in files(folder).items() if not name.endswith(".partial")}


def change_state(folder: Path, **changes: object) -> None:
    """Write the state with other values and a hash that fits."""
    values = {**json.loads((folder / "prepare.json").read_text()), **changes}
    del values["sha256"]
    (folder / "prepare.json").write_text(json.dumps({**values, "sha256": _hash(values)}))


@pytest.mark.slow
def test_a_damaged_state_never_gives_another_folder(
    unfinished: Path, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    """Of 546 damaged ones 42 gave a finished but different folder."""
    good, random_numbers = (unfinished / "prepare.json").read_bytes(), random.Random(1)
    recipe = json.loads(good)["recipe"]
    folder = Path(shutil.copytree(unfinished, tmp_path / "out"))
    for trial in range(600):
        position = random_numbers.randrange(len(good))
        bad = bytearray(good)
        if trial % 3 == 0:
            bad[position] ^= 1 << random_numbers.randrange(8)
        elif trial % 3 == 1:
            bad[position : position + 1] = str(random_numbers.randrange(10)).encode()
        else:
            del bad[position:]
        (folder / "prepare.json").write_bytes(bad)
        try:
            state = PrepareState.read(folder)
        except UserError as error:
            assert "\n" not in str(error) and "--overwrite" in str(error)
        else:
            assert state is not None and state.recipe == recipe and json.loads(bad) == json.loads(good)
    before = whole_files(folder)
    with pytest.raises(UserError, match=r"prepare\.json: .*begin again with --overwrite"):
        prepare(str(corpus), folder, **OPTIONS)
    assert whole_files(folder) == before
    prepare(str(corpus), folder, **OPTIONS, overwrite=True)
    assert files(folder) == files(reference)


@pytest.mark.parametrize("jobs", [-1, 1])
def test_a_wrong_count_of_jobs_is_found_at_the_end(unfinished: Path, corpus: Path, jobs: int, tmp_path: Path) -> None:
    """Changing it by hand lost 800,000 tokens or doubled 1.5 million, and --check was content."""
    folder = Path(shutil.copytree(unfinished, tmp_path / "out"))
    change_state(folder, jobs=json.loads((folder / "prepare.json").read_text())["jobs"] + jobs)
    with pytest.raises(UserError, match=r"its shards hold \d+ documents of \d+ bytes, the input has \d+ of \d+"):
        prepare(str(corpus), folder, **OPTIONS)
    assert not (folder / "index.json").exists()


def test_a_finished_shard_that_was_changed_is_not_gone_on_with(unfinished: Path, corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unfinished, tmp_path / "out"))
    data = bytearray((folder / "train_000000.bin").read_bytes())
    data[5000] ^= 1
    (folder / "train_000000.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"a finished shard was changed: .*train_000000.bin.* --overwrite"):
        prepare(str(corpus), folder, **OPTIONS)
    (folder / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"a finished shard was changed: .*train_000000.bin.* --overwrite"):
        prepare(str(corpus), folder, **OPTIONS)


def test_another_tokenizer_in_the_folder_is_not_gone_on_with(unfinished: Path, corpus: Path, tmp_path: Path) -> None:
    from lit_gpt.tokenizer.tokenizer import get_tokenizer

    folder = Path(shutil.copytree(unfinished, tmp_path / "out"))
    get_tokenizer("byte").save(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"not the tokenizer of the finished shards.*2 finished shards are kept"):
        prepare(str(corpus), folder, **OPTIONS)


def test_states_of_earlier_versions(unfinished: Path, reference: Path, corpus: Path, tmp_path: Path) -> None:
    """They have no hash: a finished folder is compared with its index, an unfinished one begins again."""
    for name, source in (("finished", reference), ("unfinished", unfinished)):
        folder = Path(shutil.copytree(source, tmp_path / name))
        values = json.loads((folder / "prepare.json").read_text())
        for key in ("sha256", "downloads", "tokenizer", "sources"):
            del values[key]
        (folder / "prepare.json").write_text(json.dumps(values))
    assert prepare(str(corpus), tmp_path / "finished", **OPTIONS).split("train")
    with pytest.raises(UserError, match="an earlier version's, whose work cannot be verified; begin again"):
        prepare(str(corpus), tmp_path / "unfinished", **OPTIONS)
    values["shards"] = values["shards"][:1]
    (tmp_path / "finished/prepare.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="list other shards"):
        prepare(str(corpus), tmp_path / "finished", **OPTIONS)


@pytest.mark.parametrize("key", ["documents", "text_bytes"])
def test_check_counts_documents_and_text_in_the_tokens(reference: Path, key: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference, tmp_path / "out"))
    check(str(folder))
    values = json.loads((folder / "index.json").read_text())
    values["shards"][1][key] += 1
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"index.json and prepare.json list other shards"):
        check(str(folder))
    (folder / "prepare.json").unlink()
    with pytest.raises(
        UserError, match=rf"index.json says \d+ {key.replace('text_bytes', 'bytes of text')}, its tokens"
    ):
        check(str(folder))


def test_check_compares_the_vocabulary_with_the_tokenizer(reference: Path, tmp_path: Path) -> None:
    """Found by the fuzz: a digit more in vocab_size passed."""
    folder = Path(shutil.copytree(reference, tmp_path / "out"))
    values = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**values, "vocab_size": 5000}))
    with pytest.raises(UserError, match=r"index.json says .* = \(5000, 499\), its tokenizer \(500, 499\)"):
        check(str(folder))


def test_check_finds_a_lost_shard(reference: Path, tmp_path: Path) -> None:
    """One that is gone with its line of the index was not noticed."""
    folder = Path(shutil.copytree(reference, tmp_path / "out"))
    values = json.loads((folder / "index.json").read_text())
    (folder / values["shards"].pop(1)["name"]).unlink()
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="list other shards"):
        check(str(folder))


# ---------------------------------------------------------------- what is kept


def failing(unfinished: Path, corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the corpus and of the half prepared folder that goes on with it."""
    texts, folder = Path(shutil.copytree(corpus, tmp_path / "texts")), tmp_path / "out"

    def run() -> None:
        die_at(7, before=True)
        prepare(str(texts), folder, **OPTIONS)

    assert in_a_child(run) == signal.SIGKILL
    return texts, folder


@pytest.mark.slow
def test_a_source_that_vanishes_for_a_moment_costs_no_finished_shard(
    unfinished: Path, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, folder = failing(unfinished, corpus, tmp_path)
    before = whole_files(folder)
    read_texts = module.read_texts

    def vanish(source: Any, on_read: Any) -> Any:
        if source.path.name == "20.txt":
            os.rename(texts / "20.txt", texts / "20.moved")
        return read_texts(source, on_read)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"20.txt: vanished .*2 finished shards are"):
        patch.setattr(module, "read_texts", vanish)
        prepare(str(texts), folder, **OPTIONS)
    os.rename(texts / "20.moved", texts / "20.txt")
    after = files(folder)
    assert {name: after[name] for name in before} == before
    prepare(str(texts), folder, **OPTIONS)
    ours, theirs = files(folder), files(reference)
    assert {name: ours[name] for name in ours if name != "prepare.json"} == {
        name: theirs[name] for name in theirs if name != "prepare.json"
    }


def test_text_that_is_wrong_for_good_leaves_nothing(unfinished: Path, corpus: Path, tmp_path: Path) -> None:
    texts = Path(shutil.copytree(corpus, tmp_path / "texts"))
    write(texts / "39.txt", b"\xff" * 99)
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(str(texts), tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_source_that_changes_while_it_is_read_is_not_mixed_in(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Path(shutil.copytree(corpus, tmp_path / "texts"))
    read_texts = module.read_texts

    def change(source: Any, on_read: Any) -> Any:
        if source.path.name == "39.txt":
            write(texts / "38.txt", CODE)
        return read_texts(source, on_read)

    monkeypatch.setattr(module, "read_texts", change)
    with pytest.raises(UserError, match=r"38.txt: changed while it was read"):
        prepare(str(texts), tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out/index.json").exists()


@pytest.mark.slow
def test_a_download_that_fails_later_throws_nothing_away(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards went when the second of two addresses could not be had again."""
    first, second = server("a.txt", CODE.encode() * 999), server("b.txt", CODE.encode() * 2000)
    options = {"tokenizer": "byte", "shard_tokens": 1000, "val_split": "hash:0"}
    run = partial(prepare, [first, second], **options)

    def killed() -> None:
        die_at(8, before=True)
        run(tmp_path / "out")

    assert in_a_child(killed) == signal.SIGKILL
    finished = [shard["name"] for shard in json.loads((tmp_path / "out/prepare.json").read_text())["shards"]]
    assert finished
    for path in (tmp_path / "out/.downloads").iterdir():
        if path.name.endswith("b.txt"):
            path.unlink()
    server("b.txt", None)
    with pytest.raises(UserError, match=r"b\.txt: cannot be fetched .*finished shards are kept"):
        run(tmp_path / "out")
    assert all((tmp_path / "out" / name).exists() for name in finished)
    server("b.txt", CODE.encode() * 2001)
    with pytest.raises(UserError, match=r"an address gives other text than when this was begun; .* are kept"):
        run(tmp_path / "out")
    (tmp_path / "whole").mkdir()
    overwritten = run(tmp_path / "out", overwrite=True)
    assert overwritten == run(tmp_path / "whole")


def test_the_first_of_two_downloads_is_kept(server: Any, tmp_path: Path) -> None:
    good, gone = server("a.txt", CODE.encode() * 99), server("b.txt", None)
    with pytest.raises(UserError, match="cannot be fetched"):
        prepare([good, gone], tmp_path / "out", "byte", val_split="hash:0")
    assert [path.name[-5:] for path in (tmp_path / "out/.downloads").iterdir()] == ["a.txt"]
    server("b.txt", CODE.encode() * 99)
    server("a.txt", None)
    assert (
        sum(shard.documents for shard in prepare([good, gone], tmp_path / "out", "byte", val_split="hash:0").shards)
        == 2
    )
