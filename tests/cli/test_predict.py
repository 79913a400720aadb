"""`lit_gpt predict` as a user runs it: order, ranks, a killed run, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from models import tiny_gpt

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.checkpoint.format import save_model
from lit_gpt.cli.partial_results import PartialResults
from lit_gpt.cli.predict import run_fingerprint
from lit_gpt.cli.prediction_writer import to_line, to_records
from lit_gpt.data.prompts import PromptDataset
from lit_gpt.errors import UserError
from lit_gpt.generation.complete import Completion
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer

BLOCK = 32


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of bytes."""
    model = tiny_gpt(std=0.2, dtype=torch.float32, block_size=BLOCK, n_head=2)
    path = tmp_path_factory.mktemp("ckpt") / "tiny.ckpt"
    save_model(path, model, get_tokenizer("byte"))
    return path


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Any:
    """`program`, in this process: importing torch and Lightning takes longer than all else."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = main([str(word) for word in words])
        captured = capfd.readouterr()
        return subprocess.CompletedProcess([], status, captured.out, captured.err)

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


SETTINGS = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 40, "seed": 3}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_text_to_stdout_in_the_order_of_the_prompts(ckpt: Path, inside: Any, tmp_path: Path) -> None:
    (tmp_path / "story.md").write_text("Once upon\na time")
    starts = ["--start", "ROMEO:", "--start", "{a: b}", "--start", "FILE:story.md"]
    result = inside("predict", "--ckpt_path", ckpt, *starts, *FLAGS, "--num_samples", 2)
    assert result.returncode == 0, result.stderr
    prompts = ["ROMEO:", "{a: b}", "Once upon\na time"]
    texts = load(str(ckpt)).generate(prompts, num_samples=2, **SETTINGS)
    expected = [prompt + text for prompt, pair in zip(prompts, texts) for text in pair]
    assert result.stdout == "".join(f"{text}\n{'-' * 15}\n" for text in expected)
    assert "TPU" not in result.stderr and "eed set" not in result.stderr, "neither is of this run"


@pytest.mark.slow
def test_the_ids_of_each_prompt_and_their_shape(ckpt: Path, inside: Any, tmp_path: Path) -> None:
    words = ["predict", "--ckpt_path", ckpt, "--start", "ab", "--start", "农", "--show_ids", "--num_samples", 2, *FLAGS]
    result = inside(*words)
    assert result.returncode == 0, result.stderr
    shown = [line for line in result.stdout.splitlines() if line.startswith("prompt ids")]
    assert shown == ["prompt ids [97, 98], shape (1, 2)", "prompt ids [229, 134, 156], shape (1, 3)"]
    assert result.stdout.startswith(f"{shown[0]}\nab")
    assert inside(*words, "--output", "out.jsonl").returncode == 0
    records = read(tmp_path / "out.jsonl")
    assert [record["prompt_ids"] for record in records] == [[97, 98]] * 2 + [[229, 134, 156]] * 2
    assert records[3]["prompt_shape"] == [1, 3]


@pytest.mark.slow
def test_two_ranks_write_what_one_writes_in_the_order_of_the_input(
    ckpt: Path, fork_server: ForkServer, inside: Any, tmp_path: Path
) -> None:
    lines = [{"prompt": f"line {i}"} if i % 3 else {"prompt": [i % 257, 1, 2]} for i in range(130)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["predict", "--ckpt_path", ckpt, "--prompts", "many.jsonl", *FLAGS, "--trainer.accelerator", "cpu"]
    one_rank = inside(*common, "--output", "out1.jsonl", "--trainer.devices", 1)
    words = ("-m", "lit_gpt", *common, "--output", "out2.jsonl", "--trainer.devices", 2)
    for result in (one_rank, *fork_server.run_ranks(2, *words, cwd=tmp_path)):
        assert result.returncode == 0, result.stderr
        assert result.stdout == ""
    one, two = read(tmp_path / "out1.jsonl"), read(tmp_path / "out2.jsonl")
    assert one == two
    assert [record["index"] for record in one] == list(range(130))
    assert [record["prompt"] for record in one] == [line["prompt"] for line in lines]
    assert list(tmp_path.glob("*.partial*")) == []
    expected = load(str(ckpt)).complete([lines[i]["prompt"] for i in (0, 1, 129)], **SETTINGS)  # type: ignore[arg-type]
    assert [one[i]["ids"] for i in (0, 1, 129)] == [completion.ids for (completion,) in expected]


@pytest.mark.slow
def test_fewer_prompts_than_ranks_are_refused(ckpt: Path, inside: Any, tmp_path: Path) -> None:
    """Lightning ended in a bare AssertionError, after it had started the ranks."""
    for output in ([], ["--output", "out.jsonl"]):
        words = ["--start", "a", *output, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
        result = inside("predict", "--ckpt_path", ckpt, *words)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1] == (
            "lit_gpt: error: 2 devices cannot share 1 prompt: use --trainer.devices 1"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_resumes_and_redoes_nothing(
    ckpt: Path, fork_server: ForkServer, inside: Any, tmp_path: Path
) -> None:
    (tmp_path / "many.txt").write_text("".join(f"prompt {i}\n" for i in range(800)))
    words = ["predict", "--ckpt_path", str(ckpt), "--prompts", "many.txt", "--output", "out.jsonl", *FLAGS]
    partial = tmp_path / "out.jsonl.partial"
    process = fork_server.start("-m", "lit_gpt", *words, cwd=tmp_path)
    deadline = time.monotonic() + 240
    while not (partial.exists() and partial.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    partial.write_bytes(partial.read_bytes() + b'{"index": 799, "sample": 0, "sam')  # torn by the kill
    before = partial.read_bytes().splitlines()[1:-1]
    assert 50 < len(before) < 800

    refused = inside(*words)
    assert refused.returncode == 2
    assert "is an unfinished run: go on with --resume, or delete it" in refused.stderr
    other = inside(*words, "--temperature", 0.5, "--resume")
    assert other.returncode == 2
    assert "was begun with other prompts, settings or weights" in other.stderr

    marked = [line.replace(b'"text": "', b'"text": "KEPT ') for line in before]
    head = partial.read_bytes().splitlines()[0]
    partial.write_bytes(b"\n".join([head, *marked]) + b"\n")
    result = inside(*words, "--resume")
    assert result.returncode == 0, result.stderr
    records = read(tmp_path / "out.jsonl")
    assert [record["index"] for record in records] == list(range(800))
    assert sum(record["text"].startswith("KEPT ") for record in records) == len(before)
    assert not partial.exists()
    again = inside(*words, "--resume")
    assert (again.returncode, "is complete" in again.stderr) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "a", "--temperature", "-1"], "temperature=-1.0 is outside [0, ∞)"),
        (["--start", "a", "--stop", ""], "stop has an empty string"),
        (["--start", "a" * 50, "--overflow", "stop"], "prompt 1 has 50 tokens, the model's context is 32"),
        (["--prompts", "ids.jsonl"], "prompt 1 has token id 999, outside the vocabulary of 257: use ids 0 … 256"),
        ([], "there are no prompts: give --start"),
        (["--start", "a", "--resume"], "--resume goes on with a file of results: name it with --output"),
        (["--start", "a", "--strategy", "speculative", "--draft", "other.ckpt"], "use a draft with the same tokenizer"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_any_work(
    words: list[str], message: str, ckpt: Path, tmp_path: Path, inside: Any
) -> None:
    (tmp_path / "ids.jsonl").write_text('{"prompt": [999]}\n')
    small = GPT(GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=8))
    save_model(tmp_path / "other.ckpt", small, None)
    result = inside("predict", "--ckpt_path", ckpt, *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_the_precision_of_training_is_refused(ckpt: Path, inside: Any, tmp_path: Path, precision: str) -> None:
    run = inside(
        "predict", "--ckpt_path", ckpt, "--start", "a", "--output", "out.jsonl", "--trainer.precision", precision
    )
    assert run.returncode == 2 and run.stdout == "" and not list(tmp_path.iterdir())
    message = f"trainer.precision={precision} is for training: use --precision fp32, bf16, int8 or int4"
    assert message in run.stderr and len(run.stderr.splitlines()) == 1


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_bytes("one\r\n\n 二 \nlast".encode())
    assert [prompt.prompt for prompt in PromptDataset(["first"], str(lines))] == ["first", "one", " 二 ", "last"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x\\ny", "id": 4}\n\n{"prompt": [1, 2]}\n')
    assert [prompt.prompt for prompt in PromptDataset([], str(tmp_path / "a.jsonl"))] == ["x\ny", [1, 2]]
    for content, message in [
        (b"", "has no prompts"),
        (b'{"prompt": 3}\n', 'prompt 1 has no "prompt" that is text or a list of token ids'),
        (b'{"prompt": "a"}\n{prompt}\n', "prompt 2 is not JSON"),
        (b'{"prompt": "a"}\n\xff\n', "prompt 2 is not UTF-8 text at its byte 0"),
    ]:
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            PromptDataset([], str(tmp_path / "bad.jsonl"))
    with pytest.raises(UserError, match="No such file"):
        PromptDataset(["FILE:missing.md"])


def test_prompts_are_read_from_the_disk_when_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"{i}{'x' * 1000}\n" for i in range(3000)))
    dataset = PromptDataset([], str(path))
    assert dataset._offsets.itemsize * len(dataset._offsets) < 30_000
    assert dataset[2999].prompt == f"2999{'x' * 1000}"
    assert dataset.fingerprint != PromptDataset(["a"], str(path)).fingerprint


def test_only_whole_prompts_count_as_finished(tmp_path: Path) -> None:
    partial = PartialResults(tmp_path / "out.jsonl", "run")
    dataset = PromptDataset(["a", "b", "c"])
    lines = [[to_line(record) for record in to_records(prompt, [Completion("x")] * 2)] for prompt in dataset]
    with partial.append(0) as file:
        file.write(b"".join(lines[2]) + lines[0][0])  # the second sample of prompt 0 is missing
    with partial.append(1) as file:
        file.write(b"".join(lines[1]))
    assert partial.finished(resume=True, total=3) == {1, 2}
    with partial.append(0) as file:
        file.write(b"".join(lines[0]))
    partial.finish()
    assert [(line["index"], line["sample"]) for line in read(tmp_path / "out.jsonl")] == [
        (i, j) for i in range(3) for j in range(2)
    ]


def finish_a_run(output: Path, prompts: int = 3) -> None:
    partial = PartialResults(output, "run")
    partial.finished(resume=False, total=prompts)
    with partial.append(0) as file:
        for prompt in PromptDataset(["a"] * prompts):
            file.write(b"".join(map(to_line, to_records(prompt, [Completion("x")]))))
    partial.finish()


@pytest.mark.slow
def test_two_runs_with_one_output_do_not_empty_it(ckpt: Path, inside: Any, tmp_path: Path) -> None:
    first = PartialResults(tmp_path / "out.jsonl", "run")
    first.reserve()
    words = ("predict", "--ckpt_path", ckpt, "--start", "a", "--max_new_tokens", 1, "--output", "out.jsonl")
    refused = inside(*words)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "another run writes to out.jsonl: wait for its end, or name another file" in refused.stderr
    first.release()
    assert inside(*words).returncode == 0
    assert len(read(tmp_path / "out.jsonl")) == 1
    second = inside(*words)
    assert (second.returncode, "exists already and is complete" in second.stderr) == (2, True)
    assert list(tmp_path.glob(".*")) == []  # no lock file is left behind


@pytest.mark.slow
def test_a_run_killed_between_its_output_and_its_partial_files_leaves_none(
    ckpt: Path, inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by scripts/torture.py: the partial file stayed beside the whole output, whatever was run."""
    words = ("predict", "--ckpt_path", ckpt, "--start", "a", "--max_new_tokens", 1, "--output", "out.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # all that is left after the output is written
        assert inside(*words).returncode == 0
    (tmp_path / "out.jsonl.partial.1").write_text('{"run": "another"}\n')
    output = (tmp_path / "out.jsonl").read_bytes()
    assert (tmp_path / "out.jsonl.partial").exists()
    assert inside(*words, "--resume").returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".out.jsonl.lock"} == {"out.jsonl", "out.jsonl.partial.1"}
    assert (tmp_path / "out.jsonl").read_bytes() == output


@pytest.mark.parametrize("name", ["res[1].jsonl", "a*.jsonl", "?.jsonl", "[!a].jsonl"])
def test_an_output_whose_name_is_a_glob_pattern_is_not_empty(name: str, tmp_path: Path) -> None:
    (tmp_path / "res1.jsonl.partial").write_text("of another run\n")
    (tmp_path / f"{name}.partial.bak").write_text("the user's\n")
    finish_a_run(tmp_path / name)
    assert len(read(tmp_path / name)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [name, f"{name}.partial.bak", "res1.jsonl.partial"]
    )


def test_an_output_with_results_missing_is_not_written(tmp_path: Path) -> None:
    partial = PartialResults(tmp_path / "out.jsonl", "run")
    assert partial.finished(resume=False, total=2) == set()
    (prompt,) = PromptDataset(["a"])
    with partial.append(0) as file:
        file.write(b"".join(map(to_line, to_records(prompt, [Completion("x")]))))
    with pytest.raises(RuntimeError, match="has the results of 1 of 2 prompts: go on with --resume"):
        partial.finish()
    assert not (tmp_path / "out.jsonl").exists()
    assert partial.finished(resume=True, total=2) == {0}


@pytest.mark.parametrize(
    "line", [b"null", b"{", b'{"index": "0", "sample": 0, "samples": 1}', b'{"sample": 1}', b"[" * 9999, b"\xff"]
)
def test_a_damaged_partial_file_is_refused_in_one_line(line: bytes, tmp_path: Path) -> None:
    partial = PartialResults(tmp_path / "out.jsonl", "run")
    for content in (b'{"run": "run"}\n' + line + b"\n", line + b"\n"):
        partial.path(0).write_bytes(content)
        with pytest.raises(UserError, match=r"out\.jsonl\.partial (is damaged|was begun)"):
            partial.finished(resume=True, total=1)


def test_resume_refuses_changed_precision_and_changed_weights_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "draft.ckpt"):
        (folder / name).write_bytes(b"old")
    prompts = PromptDataset(["a"])
    settings = GenerationConfig(strategy="speculative", draft=str(tmp_path / "draft.ckpt"))

    def fingerprint(precision: str = "auto") -> str:
        return run_fingerprint(prompts, settings, str(folder), [precision])

    seen = {fingerprint(), fingerprint("int8")}
    assert fingerprint() in seen
    (folder / "model.safetensors").write_bytes(b"longer")
    seen.add(fingerprint())
    os.utime(folder / "config.json", ns=(0, 0))
    seen.add(fingerprint())
    (tmp_path / "draft.ckpt").write_bytes(b"new")
    seen.add(fingerprint())
    assert len(seen) == 5
