"""`lit_gpt freeze`: a whole folder or none, its verification, and its name wherever a checkpoint is named."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import FIXTURES, ROOT
from fork_server import ForkServer
from run_folders import write_run

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.checkpoint.format import KEY, load_checkpoint, load_model, save_checkpoint
from lit_gpt.checkpoint.frozen import MANIFEST, frozen_checkpoint, read_manifest
from lit_gpt.convert.recognise import files_of_source, open_source
from lit_gpt.errors import UserError
from lit_gpt.runs import freeze as freezing
from lit_gpt.runs.freeze import freeze
from lit_gpt.runs.record import read_run

FILES = {"poet.ckpt", "tokenizer.json", "config.yaml", "run.jsonl", "origin.json", "samples.json", "README.md"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with a checkpoint as a run writes it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_GPT_FROZEN", raising=False)
    content = load_checkpoint(FIXTURES / "modern.ckpt")
    content |= {"optimizer_states": [{"state": torch.ones(9)}], "loops": {"a": 1}, "global_step": 20}
    content["callbacks"] = {"ModelCheckpoint": {"monitor": "val/loss", "best_model_score": torch.tensor(2.0), "x": "y"}}
    content["TokenDataModule"] = {"fingerprint": "f" * 64, "accumulate": 1, "block_size": 8}
    content["datamodule_hyper_parameters"] = {"path": "tokens", "batch_size": 4}
    content[KEY]["validation"] = {"step": 20, "loss": 2.0, "bits_per_byte": 1.0}
    save_checkpoint(tmp_path / "whole.ckpt", content)
    return write_run(tmp_path / "version_0", checkpoint=tmp_path / "whole.ckpt")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["freeze", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.strip().splitlines()) == 1
    return printed.err


@pytest.mark.slow
def test_a_frozen_folder_has_all_that_is_known_of_the_model_and_does_not_change(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["freeze", str(run), "--name", "poet", "--license", "apache-2.0"]) == 0
    told = capsys.readouterr().out.splitlines()
    folder = Path("frozen/poet")
    manifest = read_manifest(folder)
    assert told == ["frozen/poet", f"manifest {manifest.sha256}"]
    assert set(manifest.files) == FILES == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o555
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in folder.iterdir())
    assert (folder / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["run"]["folder"] == "version_0" and origin["validation"]["loss"] == 2.0
    assert origin["data"]["val_sha256"] == "b" and len(origin["frozen_with"]["code"]["sha256"]) == 64
    assert origin["weights_sha256"] == open_source(str(run / "checkpoints/best.ckpt")).weights_sha256
    assert str(run.parent) not in (folder / "origin.json").read_text(), "where it was is nobody else's concern"
    card = (folder / "README.md").read_text("utf-8")
    assert 'lit_gpt.load("frozen:poet")' in card and "apache-2.0" in card and "AutoModel" not in card
    assert len(json.loads((folder / "samples.json").read_text())["texts"]) == 3
    content = load_checkpoint(folder / "poet.ckpt")
    assert not {"optimizer_states", "loops"} & set(content)
    source = open_source("frozen:poet")
    assert source.training is not None and source.training.best_loss == 2.0 and source.training.fingerprint == "f" * 64
    whole, _ = load_model(run / "checkpoints/best.ckpt")
    frozen, _ = load_model(folder / "poet.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), frozen.state_dict().values()))
    assert main(["freeze", "--verify", "poet"]) == 0
    assert capsys.readouterr().out.startswith("frozen/poet: 7 files as they were frozen 20")
    assert "exists already, and what is frozen does not change" in refused(capsys, str(run), "--name", "poet")


@pytest.mark.slow
def test_every_changed_file_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = freeze(read_run(run), "poet")
    folder.chmod(0o755)
    for path in sorted(folder / name for name in FILES):
        path.chmod(0o644)
        data = path.read_bytes()
        for changed in (data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], data + b"\n", b""):
            path.write_bytes(changed)
            assert path.name in refused(capsys, "--verify", "poet")
        path.write_bytes(data)
    assert main(["freeze", "--verify", "frozen:poet"]) == 0
    (folder / "notes.txt").write_text("")
    (folder / "samples.json").unlink()
    line = refused(capsys, "--verify", "poet")
    assert "samples.json is gone" in line and "'notes.txt' was added" in line
    (folder / "samples.json").symlink_to(FIXTURES / "text.txt")
    assert "samples.json is gone" in refused(capsys, "--verify", "poet")


MANIFESTS = (
    b"", b"[]", b"{}", b'{"format": 1}', b"[" * 100_000,
    b'{"format": "lit_gpt.frozen", "version": 1, "name": "poet", "frozen_at": "2026-01-01", "files": {"../a": {}}}',
)  # fmt: skip


def test_a_damaged_manifest_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = freeze(read_run(run), "poet")
    folder.chmod(0o755)
    (folder / MANIFEST).chmod(0o644)
    for manifest in MANIFESTS:
        (folder / MANIFEST).write_bytes(manifest)
        assert "manifest.json is damaged" in refused(capsys, "--verify", "poet"), manifest[:20]


@pytest.mark.slow
def test_what_is_not_to_be_frozen_is_refused_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going = write_run(Path("going"), finished=False, checkpoint=FIXTURES / "modern.ckpt")
    empty = write_run(Path("empty"))
    assert "has not come to its end: let it end, or" in refused(capsys, str(going), "--name", "poet")
    assert "has no checkpoint yet" in refused(capsys, str(empty), "--name", "poet")
    assert "is no name of a frozen model" in refused(capsys, str(run), "--name", "../poet")
    assert "needs a name" in refused(capsys, str(run))
    assert "needs a run" in refused(capsys, "--name", "poet")
    assert "leave x out" in refused(capsys, "--verify", "poet", "--name", "x")
    assert "make one with lit_gpt freeze" in refused(capsys, "--verify", "poet")
    assert "no-such" in refused(capsys, str(run), "--name", "poet", "--license", "no-such")
    assert not Path("frozen").exists()
    assert main(["freeze", str(going), "--name", "going", "--unfinished"]) == 0
    assert json.loads(Path("frozen/going/origin.json").read_text())["run"]["finished"] is False
    assert 'did you mean "going"?' in refused(capsys, "--verify", "goin")


@pytest.mark.slow
def test_a_failure_half_way_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(freezing, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        freeze(read_run(run), "poet")
    assert list(Path("frozen").iterdir()) == []
    monkeypatch.setenv("LIT_GPT_FROZEN", str(run / "config.yaml"))
    with pytest.raises(UserError, match="set LIT_GPT_FROZEN to a folder that can"):
        freeze(read_run(run), "poet")


KILLED = """
import os, signal, sys
from pathlib import Path
from lit_gpt.runs import freeze, frozen_content
point = int(sys.argv[2])
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
for number, (module, name) in enumerate([
    (frozen_content, "_write_json"), (frozen_content, "model_card"), (freeze, "write_manifest"), (os, "rename"),
]):
    if number == point:
        setattr(module, name, kill)
freeze.freeze(freeze.read_run(Path(sys.argv[1])), "poet")
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_frozen_folder(run: Path, fork_server: ForkServer) -> None:
    (run.parent / "killed.py").write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for point in range(4):
        done = fork_server.run(run.parent / "killed.py", run, point, cwd=run.parent, env=env)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not Path("frozen/poet").exists()
        with pytest.raises(UserError, match='no frozen model "poet"'):
            frozen_checkpoint("frozen:poet")
    freeze(read_run(run), "poet")
    assert frozen_checkpoint("frozen:poet") == Path("frozen/poet/poet.ckpt")


# The name ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_name_goes_wherever_a_checkpoint_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_GPT_FROZEN", str(run.parent / "kept"))
    freeze(read_run(run), "poet")
    monkeypatch.chdir(run)
    best = str(run / "checkpoints/best.ckpt")
    settings = {"max_new_tokens": 5, "seed": 1}
    assert load("frozen:poet").generate("a", **settings) == load(best).generate("a", **settings)
    for argv in (["info", "--ckpt_path", "X"], ["info", "--init_from", "X"], ["tokenize", "abc", "--ckpt_path", "X"]):
        shown = []
        for name in ("frozen:poet", best):
            assert main([*(name if word == "X" else word for word in argv), "--format", "json"]) == 0
            shown.append(re.sub(r'"source": "[^"]*"', "", capsys.readouterr().out))
        assert shown[0] == shown[1] != ""
    assert main(["convert", "frozen:poet", "out.ckpt"]) == 0
    assert open_source("out.ckpt").weights_sha256 == open_source(best).weights_sha256
    assert [path.name for path in files_of_source("frozen:poet")] == ["poet.ckpt"]
    for name, message in (("frozen:pot", "did you mean"), ("frozen:../x", "is no name"), ("frozen:", "is no name")):
        assert main(["info", "--init_from", name]) == 2
        assert message in capsys.readouterr().err


def test_serve_shows_the_name_and_the_manifest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_gpt.serve.main import build_service
    from lit_gpt.serve.options import parse

    _, manifest = freeze(read_run(run), "poet")
    for flag in ("--ckpt_path", "--init_from"):
        service = build_service(parse([flag, "frozen:poet", "--device", "cpu"]), "frozen:poet")
        assert service.card()["id"] == "poet" and service.card()["frozen_sha256"] == manifest.sha256
        service.close()
        assert f"manifest {manifest.sha256}" in capsys.readouterr().err


@pytest.mark.slow
def test_training_starts_from_a_frozen_model_and_never_goes_on_with_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze(read_run(run), "poet")
    assert main(["fit", "--ckpt_path", "frozen:poet"]) == 2
    assert "start from it with --init_from frozen:poet" in capsys.readouterr().err
    before = Path("frozen/poet/poet.ckpt").read_bytes()
    argv = ["--data.path", "tokens", "--data.source", str(FIXTURES / "text.txt"), "--data.val_split", "tail:0.2"]
    argv += ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    argv += ["--trainer.precision", "32-true", "--trainer.num_sanity_val_steps", "0", "--samples.prompts", "[]"]
    assert main(["fit", "--init_from", "frozen:poet", "--data.batch_size", "2", *argv]) == 0
    assert Path("frozen/poet/poet.ckpt").read_bytes() == before
    capsys.readouterr()
    assert main(["predict", "--ckpt_path", "frozen:poet", "--start", "a", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out
