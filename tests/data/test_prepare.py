"""prepare: the right tokens, whatever the workers, in bounded memory, and checked byte by byte."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from environment import ROOT, RunProgram
from preparing import CHINESE, CODE, OPTIONS, files, write

from lit_gpt.__main__ import main
from lit_gpt.data import prepare as module
from lit_gpt.data.prepare import prepare
from lit_gpt.data.readers import read_texts
from lit_gpt.data.shard_folder import load_index, open_tokens
from lit_gpt.data.text_source import TextSource
from lit_gpt.data.workers import Workers
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

pytestmark = pytest.mark.usefixtures("small_jobs")


@pytest.mark.slow
def test_the_shards_are_the_documents_tokens_each_with_its_end(corpus: Path, reference: Path) -> None:
    tokenizer = Tokenizer.load(reference)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for path in sorted(corpus.iterdir()):
        text = path.read_text("utf-8")
        first = next(read_texts(TextSource(path, ""))).text
        digest = hashlib.blake2b(first.encode(), digest_size=8).digest()
        split = "val" if int.from_bytes(digest, "big") / 2**64 < 0.2 else "train"
        expected[split] += [*tokenizer.encode(text), tokenizer.eot_id or 0]
    for split, ids in expected.items():
        stream = open_tokens(reference, split)
        assert stream.read(0, len(stream)).tolist() == ids
    index = load_index(reference)
    assert sum(shard.documents for shard in index.shards) == 40
    assert sum(shard.text_bytes for shard in index.shards) == sum(path.stat().st_size for path in corpus.iterdir())
    assert (index.tokenizer, index.tokenizer_hash) == ("bpe:500", tokenizer.hash)
    assert (index.vocab_size, index.eot_id, index.eot_position) == (500, 499, "after")


def test_the_tail_of_one_file_is_held_out_to_the_character(tmp_path: Path) -> None:
    text = CHINESE * 500
    prepare(str(write(tmp_path / "x.txt", text)), tmp_path / "out", tokenizer="char", val_split="tail:0.1")
    tokenizer, parts = Tokenizer.load(tmp_path / "out"), []
    for split in ("train", "val"):
        stream = open_tokens(tmp_path / "out", split)
        ids = stream.read(0, len(stream))
        assert ids[-1] == tokenizer.eot_id and tokenizer.eot_id not in ids[:-1]
        parts.append(tokenizer.decode(ids))
    assert "".join(parts) == text
    assert abs(len(parts[1].encode()) - 0.1 * len(text.encode())) < 4


@pytest.mark.slow
def test_one_file_of_ones_own_always_works(tmp_path: Path) -> None:
    for name, text in (("tiny", "to be"), ("chinese", "明" * 500_000), ("spaces", " " * 300_000 + "\n" * 300_000)):
        index = prepare(str(write(tmp_path / f"{name}.txt", text)), tmp_path / name, tokenizer="byte", workers=2)
        assert {shard.split for shard in index.shards} == {"train", "val"}
        assert sum(shard.text_bytes for shard in index.shards) == len(text.encode())


@pytest.mark.slow
def test_tables_folders_and_the_standard_library_from_the_command_line(
    program: RunProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(json.dumps({"body": text}) + "\n" for text in [CHINESE, CODE, "<|endoftext|>"])
    write(tmp_path / "texts" / "rows.jsonl", rows)
    write(tmp_path / "texts" / "rows.csv", 'body,x\n"a,\nb",1\n')
    done = program(
        "prepare", "texts", "--output", "out", "--tokenizer", "char", "--text_field", "body", "--val_split", "hash:0"
    )
    assert done.returncode == 0, done.stderr
    documents, size = 4, len((CHINESE + CODE + "<|endoftext|>" + "a,\nb").encode())
    tokens = len(CHINESE + CODE + "<|endoftext|>" + "a,\nb") + documents
    assert done.stdout.splitlines()[-1].split() == ["all", "4", str(size), str(tokens), f"{size / tokens:.3f}"]
    assert "no document fell into validation" in done.stderr and "MB/s" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--check", "out"]) == 0
    assert "all right" in capsys.readouterr().out
    assert main(["prepare", "--show", "out"]) == 0
    shown = capsys.readouterr().out
    assert CHINESE in shown and "document 3" in shown
    again = ["texts", "--output=out", "--tokenizer=char", "--text_field=body", "--val_split=hash:0"]
    assert main(["prepare", *again]) == 0
    printed = capsys.readouterr()
    assert printed.out == done.stdout and "already holds exactly this" in printed.err


def test_auto_counts_documents_it_has_to_read(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", "".join(json.dumps({"text": f"{i} {CODE}"}) + "\n" for i in range(50)))
    many = write(tmp_path / "many.jsonl", "".join(json.dumps({"text": f"{i} {CODE}"}) + "\n" for i in range(400)))
    for path, rule in ((few, "tail:0.1"), (many, "hash:0.05")):
        prepare(str(path), tmp_path / path.stem, tokenizer="byte")
        assert json.loads((tmp_path / path.stem / "prepare.json").read_text())["val_split"] == rule
    index = load_index(tmp_path / "few")
    held_out, whole = (sum(shard.text_bytes for shard in shards) for shards in (index.split("val"), index.shards))
    assert held_out == pytest.approx(0.1 * whole, abs=4)


def test_a_dtype_that_holds_the_vocabulary(tmp_path: Path) -> None:
    big = Tokenizer.build(
        "big", "(?s:.)", get_tokenizer("byte").ranks | {"明".encode(): 70_000}, {"<|endoftext|>": 70_001}
    )
    big.save(tmp_path / "big.json")
    index = prepare(str(write(tmp_path / "x.txt", "明a" * 90)), tmp_path / "out", tokenizer=str(tmp_path / "big.json"))
    assert index.dtype == "uint32" and open_tokens(tmp_path / "out", "train").read(0, 2).tolist() == [70_000, 97]


def test_a_tokenizer_without_end_of_text_separates_nothing(tmp_path: Path) -> None:
    bare = Tokenizer.build("bare", "(?s:.)", get_tokenizer("byte").ranks, {})
    bare.save(tmp_path / "bare.json")
    for name in ("a", "b"):
        write(tmp_path / "texts" / f"{name}.txt", name * 50)
    index = prepare(
        str(tmp_path / "texts"), tmp_path / "out", tokenizer=str(tmp_path / "bare.json"), val_split="hash:0"
    )
    assert (index.eot_id, index.eot_position) == (None, None)
    assert bytes(open_tokens(tmp_path / "out", "train").read(0, 100).astype(np.uint8)) == b"a" * 50 + b"b" * 50


# ---------------------------------------------------------------- the same bytes, always


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BYTES_PER_WORKER", 1)
    prepare(str(corpus), tmp_path / "out", **{**OPTIONS, "workers": 3})  # two: see test_prepare_resume.py
    assert files(tmp_path / "out") == files(reference)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_workers_answer_in_the_order_of_the_jobs() -> None:
    jobs = [[(f"{number} " * (2000 if number % 5 == 0 else 1), number % 3 > 0, "train")] for number in range(40)]
    answers = []
    for count in (1, 3):
        with Workers(get_tokenizer("byte"), "uint16", count) as workers:
            answers.append([result["train"].tokens.tolist() for result in workers.map(jobs)])
    assert answers[0] == answers[1]


def test_check_finds_a_foreign_tokenizer_and_a_flipped_bit(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(reference, tmp_path / "other")
    get_tokenizer("byte").save(tmp_path / "other" / "tokenizer.json")
    assert main(["prepare", "--check", "other"]) == 2
    assert "not the tokenizer that made the shards (bpe:500)" in capsys.readouterr().err
    shutil.copytree(reference, tmp_path / "flipped")
    with (tmp_path / "flipped" / "train_000001.bin").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    assert main(["prepare", "--check", "flipped"]) == 2
    printed = capsys.readouterr().err
    assert "train_000001.bin" in printed and "sha256" in printed


# ---------------------------------------------------------------- memory


def peak(process: str) -> float:
    """Peak resident memory in MiB. (`ru_maxrss` would count what the process was forked from.)"""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_stays_bounded(compressed: bool, tmp_path: Path) -> None:
    size, line, texts = 2_200_000, ("x" * 9 + " ") * 100, tmp_path / "texts"
    if compressed:
        write(texts / "bytes.txt.gz", gzip.compress(line.encode() * (size // 1000), 1))
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"text": [line] * (size // 1000)})
        pytest.importorskip("pyarrow.parquet").write_table(table, texts / "rows.parquet", use_dictionary=False)
    else:
        # More than `BYTES_PER_WORKER`, and than training takes of words that hardly come again; no space or line end.
        points = np.random.default_rng(0).zipf(1.3, 1_430_000) % 9000 + 0x4E00
        points[::9] = ord("，")
        write(texts / "chinese.txt", points.astype("<u4").tobytes().decode("utf-32-le"))
        write(texts / "rows.jsonl", f'{{"text": "{line}"}}\n' * (size // 1000))
    flags = ["--tokenizer=bpe:264", "--workers=2", "--output=out"]  # a few merges: those after take no more memory
    command = [sys.executable, "-m", "lit_gpt", "prepare", str(texts), *flags]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    peaks: dict[str, float] = {}
    while process.poll() is None:
        with contextlib.suppress(OSError):  # one that has just ended
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            threads = Path(f"/proc/{process.pid}/task").glob("*/children")
            children += [child for file in threads for child in file.read_text().split()]
            for number in {str(process.pid), *children}:
                peaks[number] = max(peak(number), peaks.get(number, 0))
        threading.Event().wait(0.05)
    assert process.communicate()[1] is not None and process.returncode == 0
    assert all(0 < value < 300 for value in peaks.values()), peaks
    assert len(peaks) == (1 if compressed else 3)  # so few bytes want no workers
