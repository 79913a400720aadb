"""prepare: the right tokens, whatever the workers, through kills and full disks, from files and over the network."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from environment import ROOT, RunProgram

from lit_gpt.data import prepare as module
from lit_gpt.data.prepare import prepare
from lit_gpt.data.readers import read_texts
from lit_gpt.data.shard_folder import load_index, open_tokens
from lit_gpt.data.text_source import TextSource
from lit_gpt.data.workers import Workers
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

CHINESE = "床前明月光，疑是地上霜。\n　　举头望明月，低头思故乡。\n"
CODE = "def f(x):\n    return x + 1  # it's 12345 🙂\n\n\nclass A:\n    pass\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 texts, one of more than a job: about 2 MB."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = (f"{CHINESE if line % 3 else CODE}{number * line}\n" for line in range(11_000 if number == 5 else 500))
        (folder / f"{number:02d}.txt").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus prepared in one go, in this process."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    prepare(str(corpus), folder, **OPTIONS)
    assert len(files(folder)) == 9  # three shards a split
    return folder


OPTIONS = {"tokenizer": "bpe:500", "val_split": "hash:0.2", "shard_tokens": 150_000, "workers": 1}


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, by its hash."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# ---------------------------------------------------------------- what comes out


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


def test_one_file_of_ones_own_always_works(tmp_path: Path) -> None:
    for name, text in (("tiny", "to be"), ("chinese", "明" * 500_000), ("spaces", " " * 300_000 + "\n" * 300_000)):
        index = prepare(str(write(tmp_path / f"{name}.txt", text)), tmp_path / name, tokenizer="byte", workers=2)
        assert {shard.split for shard in index.shards} == {"train", "val"}
        assert sum(shard.text_bytes for shard in index.shards) == len(text.encode())


def test_tables_folders_and_the_standard_library_from_the_command_line(program: RunProgram, tmp_path: Path) -> None:
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
    checked = program("prepare", "--check", "out")
    assert checked.returncode == 0 and "all right" in checked.stdout
    shown = program("prepare", "--show", "out")
    assert shown.returncode == 0 and CHINESE in shown.stdout and "document 3" in shown.stdout
    again = program("prepare", "texts", "--output=out", "--tokenizer=char", "--text_field=body", "--val_split=hash:0")
    assert again.stdout == done.stdout and "already holds exactly this" in again.stderr


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


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    corpus: Path, reference: Path, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BYTES_PER_WORKER", 1)
    prepare(str(corpus), tmp_path / "out", **{**OPTIONS, "workers": workers})
    assert files(tmp_path / "out") == files(reference)


def test_workers_answer_in_the_order_of_the_jobs() -> None:
    jobs = [[(f"{number} " * (2000 if number % 5 == 0 else 1), number % 3 > 0, "train")] for number in range(40)]
    answers = []
    for count in (1, 3):
        with Workers(get_tokenizer("byte"), "uint16", count) as workers:
            answers.append([result["train"].tokens.tolist() for result in workers.map(jobs)])
    assert answers[0] == answers[1]


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its status as `os.waitpid` gives it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(call: int, before: bool) -> None:
    """From now on the `call`-th file that gets its final name is the last deed, or the one before it."""
    replace, calls = os.replace, iter(range(1, 1000))

    def fatal(*names: object) -> None:
        last = next(calls) == call
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)  # type: ignore[arg-type]
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = fatal  # type: ignore[assignment]


def test_killed_at_every_file_it_goes_on_and_ends_the_same(corpus: Path, reference: Path, tmp_path: Path) -> None:
    def run(call: int, before: bool) -> None:
        die_at(call, before)
        prepare(str(corpus), tmp_path / "out", **OPTIONS)

    # State, tokenizer, three times two shards and the state, index: each run dies a little later than the last.
    kills = next(kills for kills in range(20) if not in_a_child(partial(run, 1 + kills // 2, kills % 2 == 0)))
    assert kills > 6
    assert files(tmp_path / "out") == files(reference)


def test_finished_shards_are_kept_and_not_written_again(corpus: Path, reference: Path, tmp_path: Path) -> None:
    def run() -> None:
        die_at(6, before=True)
        prepare(str(corpus), tmp_path / "out", **OPTIONS)

    assert in_a_child(run) == signal.SIGKILL
    with pytest.raises(UserError, match="was not finished; run the same lit_gpt prepare again"):
        load_index(tmp_path / "out")
    finished = [shard["name"] for shard in json.loads((tmp_path / "out/prepare.json").read_text())["shards"]]
    before = {name: (tmp_path / "out" / name).stat() for name in finished}
    assert len(finished) == 2
    prepare(str(corpus), tmp_path / "out", **OPTIONS)
    for name, status in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)  # the very files
    assert files(tmp_path / "out") == files(reference)


def test_the_program_with_workers_is_killed_from_outside(corpus: Path, reference: Path, tmp_path: Path) -> None:
    flags = [f"--{name}={value}" for name, value in {**OPTIONS, "workers": 2}.items()]
    command = [sys.executable, "-m", "lit_gpt", "prepare", str(corpus), "--output", "out", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "out/train_000001.bin").exists():
        threading.Event().wait(0.005)
    process.kill()
    process.communicate(timeout=60)  # workers hold stderr open; this returns because they end too
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    assert files(tmp_path / "out") == files(reference)


def test_overwrite_begins_anew_and_only_then(corpus: Path, reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "out")
    text = write(tmp_path / "x.txt", CODE * 99)
    before = files(tmp_path / "out")
    with pytest.raises(UserError, match=r"already holds shards made otherwise: .* --overwrite"):
        prepare(str(text), tmp_path / "out", tokenizer="byte")
    with pytest.raises(UserError, match="not UTF-8"):  # bad input is found before anything is removed
        prepare(str(write(tmp_path / "bad.txt.gz", gzip.compress(b"\xff"))), tmp_path / "out", "byte", overwrite=True)
    assert files(tmp_path / "out") == before
    prepare(str(text), tmp_path / "out", tokenizer="byte", overwrite=True)
    assert sorted(files(tmp_path / "out")) == [
        "index.json",
        "prepare.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_a_changed_input_is_not_mixed_with_what_is_there(tmp_path: Path) -> None:
    text = write(tmp_path / "x.txt", CODE * 99)
    prepare(str(text), tmp_path / "out", tokenizer="byte")
    write(text, CODE * 100)
    with pytest.raises(UserError, match="made otherwise"):
        prepare(str(text), tmp_path / "out", tokenizer="byte")
    write(tmp_path / "foreign" / "train.bin", b"12")
    with pytest.raises(UserError, match="already holds shards"):
        prepare(str(text), tmp_path / "foreign", tokenizer="byte")


def test_two_at_once_do_not_write_to_one_folder(tmp_path: Path) -> None:
    from lit_gpt.data.prepare_state import locked

    text = write(tmp_path / "x.txt", CODE * 99)
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another lit_gpt prepare is writing"):
        prepare(str(text), tmp_path / "out", tokenizer="byte")


# ---------------------------------------------------------------- memory


def peak(process: str) -> float:
    """Peak resident memory in MiB. (`ru_maxrss` would count what the process was forked from.)"""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


@pytest.mark.parametrize("kind", ["chinese.txt", "bytes.txt.gz", "rows.jsonl", "rows.parquet"])
def test_memory_stays_bounded(kind: str, tmp_path: Path) -> None:
    size, line = 6_000_000, ("x" * 9 + " ") * 100
    if kind == "chinese.txt":
        points = np.random.default_rng(0).zipf(1.3, size // 3) % 9000 + 0x4E00  # without a space or line end
        points[::9] = ord("，")
        write(tmp_path / kind, points.astype("<u4").tobytes().decode("utf-32-le"))
    elif kind == "rows.parquet":
        arrow = pytest.importorskip("pyarrow")
        table = arrow.table({"text": [line] * (size // 1000)})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / kind, use_dictionary=False)
    else:
        text = line * (size // 1000) if "gz" in kind else f'{{"text": "{line}"}}\n' * (size // 1000)
        write(tmp_path / kind, gzip.compress(text.encode(), 1) if "gz" in kind else text)
    flags = ["--tokenizer=bpe:1000", "--workers=2", "--output=out"]
    command = [sys.executable, "-m", "lit_gpt", "prepare", str(tmp_path / kind), *flags]
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
        threading.Event().wait(0.02)
    assert process.communicate()[1] is not None and process.returncode == 0
    assert all(0 < value < 300 for value in peaks.values()), peaks
    assert len(peaks) == (1 if kind in ("bytes.txt.gz", "rows.parquet") else 3)  # so few bytes want no workers


# ---------------------------------------------------------------- over the network


@pytest.fixture
def server() -> Iterator[Callable[[str, bytes], str]]:
    """`server("x.txt", b"…")` gives an address; "short/…" breaks off half-way, what is not known is 404."""
    contents: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = contents.get(self.path)
            self.send_response(404 if data is None else 200)
            data = data or b""
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if self.path.startswith("/short") else data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def add(name: str, data: bytes) -> str:
            contents[f"/{name}"] = data
            return f"http://127.0.0.1:{running.server_port}/{name}"

        yield add
        running.shutdown()


def test_an_address_is_fetched_and_prepared(server: Callable[[str, bytes], str], tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"{i} {CHINESE}"}) + "\n" for i in range(300)).encode()
    local = prepare(str(write(tmp_path / "rows.jsonl", rows)), tmp_path / "local", tokenizer="char")
    fetched = prepare(server("rows.jsonl", rows), tmp_path / "fetched", tokenizer="char")
    assert fetched == local
    assert not (tmp_path / "fetched" / ".downloads").exists()


@pytest.mark.parametrize("name", ["missing.txt", "short/x.txt", "empty.txt"])
def test_an_address_that_fails_is_named_and_leaves_nothing(
    server: Callable[[str, bytes], str], name: str, tmp_path: Path
) -> None:
    url = server("other" if name == "missing.txt" else name, b"" if name == "empty.txt" else CODE.encode() * 9999)
    url = url.replace("other", name)
    with pytest.raises(UserError, match=re.escape(url)) as error:
        prepare(url, tmp_path / "out", tokenizer="byte")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad input


def refused(tmp_path: Path, says: str, *inputs: str, **options: object) -> None:
    """`prepare` raises one line that says so, and leaves nothing."""
    with pytest.raises(UserError, match=says) as error:
        prepare(inputs, tmp_path / "out", **{"tokenizer": "byte", **options})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    good = str(write(tmp_path / "good.txt", CODE * 99))
    refused(tmp_path, "no file or folder", str(tmp_path / "goood.txt"))
    refused(tmp_path, "is empty", good, str(write(tmp_path / "empty.txt", "")))
    refused(tmp_path, "byte 5 is zero", good, str(write(tmp_path / "binary.dat", b"hello\0\1")))
    refused(tmp_path, "not UTF-8 at byte 2", good, str(write(tmp_path / "latin.txt", b"ol\xe9")), shard_tokens=100)
    refused(tmp_path, "the input holds no text", str(write(tmp_path / "none.jsonl", '{"text": ""}\n')))
    refused(tmp_path, "the input holds no text", str(write(tmp_path / "none.csv", "text\n")), val_split="hash:0.1")
    refused(tmp_path, 'did you mean "gpt2"', good, tokenizer="gpt-2")
    refused(tmp_path, "bpe:N", good, tokenizer="bpe:lots")
    refused(tmp_path, "write auto, hash:0.01 or tail:0.1", good, val_split="tail:2")
    refused(tmp_path, "at least 1", good, workers=0)
    refused(tmp_path, "no input", *[])
    with pytest.raises(UserError, match="cannot be the output folder"):
        prepare(good, tmp_path / "good.txt" / "out", tokenizer="byte")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.txt"], "name what to prepare and where to"),
        (["x.txt", "--output", "out", "--tokenzer", "byte"], "tokenzer"),
        (["x.txt", "--output", "out", "--workers", "many"], "workers"),
        (["y.txt", "--output", "out"], 'did you mean "x.txt"'),
        (["--check", "nowhere"], "no such folder"),
    ],
)
def test_the_program_says_it_in_one_line_with_status_2(
    program: RunProgram, arguments: list[str], says: str, tmp_path: Path
) -> None:
    write(tmp_path / "x.txt", CODE)
    done = program("prepare", *arguments)
    assert done.returncode == 2 and says in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_check_finds_a_foreign_tokenizer_and_a_flipped_bit(
    reference: Path, program: RunProgram, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "other")
    get_tokenizer("byte").save(tmp_path / "other" / "tokenizer.json")
    done = program("prepare", "--check", "other")
    assert done.returncode == 2 and "not the tokenizer that made the shards (bpe:500)" in done.stderr
    shutil.copytree(reference, tmp_path / "flipped")
    with (tmp_path / "flipped" / "train_000001.bin").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    done = program("prepare", "--check", "flipped")
    assert done.returncode == 2 and "train_000001.bin" in done.stderr and "sha256" in done.stderr


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_keeps_what_is_whole_and_goes_on(corpus: Path, reference: Path, tmp_path: Path) -> None:
    limit = (reference / "train_000000.bin").stat().st_size

    def run() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 5000, limit - 5000))  # EFBIG from the kernel
        try:
            prepare(str(corpus), tmp_path / "small", **OPTIONS)
        except UserError as error:
            write(tmp_path / "message", str(error)[:4000])

    in_a_child(run)
    message = (tmp_path / "message").read_text()
    assert "the disk is full (File too large)" in message and "nothing was kept" in message
    assert not (tmp_path / "small").exists()


def test_a_disk_that_fills_later_keeps_the_finished_shards(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(calls) == 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"disk is full .* finished shards are kept"):
        patch.setattr(os, "fsync", full)
        prepare(str(corpus), tmp_path / "out", **OPTIONS)
    assert not [name for name in files(tmp_path / "out") if name.endswith(".partial")]
    assert not (tmp_path / "out/index.json").exists()
    prepare(str(corpus), tmp_path / "out", **OPTIONS)
    assert files(tmp_path / "out") == files(reference)


def test_a_worker_that_dies_is_an_error_and_not_a_wait(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_gpt.data import workers

    monkeypatch.setattr(module, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(workers, "START", "import sys; sys.stdin.buffer.read(1); sys.exit(7)")
    with pytest.raises(RuntimeError, match="ended with status 7"):
        prepare(str(corpus), tmp_path / "out", **{**OPTIONS, "workers": 2})
