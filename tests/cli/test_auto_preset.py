"""`model.preset: auto`, and configs/own_text.yaml, which has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from environment import ROOT, RunProgram
from jsonargparse import Namespace

from lit_gpt.checkpoint.format import load_checkpoint
from lit_gpt.cli.auto_preset import auto_defaults
from lit_gpt.data.prepare import prepare
from lit_gpt.errors import UserError

CONFIG = ROOT / "configs" / "own_text.yaml"


def options(tmp_path: Path, **changed: object) -> Namespace:
    source = tmp_path / "own.txt"
    if not source.exists():
        source.write_text("Ein eigener Text. 自己的文本。\n" * 4000)
    data = {"path": str(tmp_path / "shards"), "source": str(source), "format": "text", "mixture": None}
    trainer = {"max_time": "00:00:03:00", "accelerator": "cpu", "precision": "auto"}
    data |= {key: value for key, value in changed.items() if key in data}
    trainer |= {key: value for key, value in changed.items() if key in trainer}
    return Namespace(data=Namespace(**data), trainer=Namespace(**trainer))


def test_a_prepared_folder_and_its_source_make_the_same_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = auto_defaults(options(tmp_path, precision="32-true"))
    assert before["data.tokenizer"] == "bpe:1024" and before["model.config.n_embd"] % 64 == 0
    assert "preset auto: 0.15 MB of text, 180 s" in capsys.readouterr().err
    prepare(str(tmp_path / "own.txt"), tmp_path / "shards", "bpe:1024", val_split="tail:0.1")
    for source in (str(tmp_path / "own.txt"), None):
        after = auto_defaults(options(tmp_path, source=source))  # the folder's tokenizer is as it is
        assert after.keys() == before.keys() - {"data.tokenizer"}
        assert (
            "0.13 MB of text" in (said := capsys.readouterr().err) and "a vocabulary of 287" in said
        )  # all that it has


def test_a_text_of_many_characters_gets_a_larger_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 4000))) * 4)
    assert auto_defaults(options(tmp_path))["data.tokenizer"] == "bpe:4096"


def test_a_text_that_is_not_utf_8_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes("自己的文本".encode("gb18030") * 100)
    with pytest.raises(UserError, match=r"own\.txt.*UTF-8"):
        auto_defaults(options(tmp_path))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_time": None}, "give --trainer.max_time"),
        ({"max_time": "3 min"}, "is no duration"),
        ({"source": None}, "give --data.source TEXT"),
        ({"source": "missing.txt"}, 'no file or folder "missing.txt"'),
        ({"source": "https://127.0.0.1:9/book.txt"}, "cannot tell the length of https://127.0.0.1:9/book.txt"),
        ({"path": None}, "give --data.path FOLDER"),
        ({"path": "https://127.0.0.1:9/shards"}, "is for one text"),
        ({"format": "chat"}, "is for one text"),
        ({"mixture": {"a": 1.0}}, "is for one text"),
    ],
)
def test_what_has_no_plan_is_refused(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        auto_defaults(options(tmp_path, **changed))
    assert not (tmp_path / "shards").exists()


def test_another_text_is_not_trained_on_under_the_name_of_the_first(tmp_path: Path) -> None:
    first = options(tmp_path)
    prepare(first.data.source, first.data.path, "bpe:1024")
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 400)
    with pytest.raises(UserError, match=r"shards holds shards of other files than .*other.txt"):
        auto_defaults(options(tmp_path, source=str(other)))


def small(folder: Path) -> list[object]:
    """Arguments of a small run with the configuration."""
    source = folder / "own.txt"
    source.write_text("".join(f"{n} mal {n} ist {n * n}.\n" for n in range(4000)))
    words = ["--config", CONFIG, "--data.path", "d", "--data.source", source, "--model.config.n_embd", "64"]
    words += ["--model.config.n_head", "1", "--model.config.block_size", "32", "--trainer.precision", "32-true"]
    return [*words, "--data.batch_size", "2", "--trainer.limit_val_batches", "2", "--trainer.max_time", "00:00:00:20"]


def test_all_ranks_have_one_plan_though_the_first_may_prepare_the_text_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide_and_prepare(name: str, decide: Callable[[], str]) -> str:
        decided = decide()
        prepare(str(tmp_path / "own.txt"), tmp_path / "shards", "bpe:1024", val_split="tail:0.1")
        return decided

    monkeypatch.setattr("lit_gpt.cli.auto_preset.decide_once", decide_and_prepare)
    assert auto_defaults(options(tmp_path))["data.tokenizer"] == "bpe:1024"


@pytest.mark.slow
def test_the_configuration_trains_resumes_and_gives_way_to_flags(tmp_path: Path, program: RunProgram) -> None:
    words = small(tmp_path)
    done = program("fit", *words, "--trainer.max_steps", "4")
    assert done.returncode == 0 and "preset auto: 0.11 MB of text, 20 s" in done.stderr, done.stderr
    resolved = yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())
    assert resolved["data"]["tokenizer"] == "bpe:512" and resolved["model"]["config"]["n_embd"] == 64
    assert resolved["model"]["preset"] is None  # it is resolved: "auto" is no shape that a module could look up
    assert resolved["model"]["config"]["n_layer"] == 4 and resolved["model"]["config"]["attn_dropout"] == 0
    assert resolved["model"]["optimizer"]["muon_weight_decay"] == 0.3
    checkpoint = load_checkpoint(next(tmp_path.rglob("last.ckpt")))
    weights, latest = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert weights.keys() == latest.keys() and any(not weights[name].equal(latest[name]) for name in weights)
    done = program("fit", *words, "--trainer.max_steps", "6", "--ckpt_path", "last")
    assert done.returncode == 0 and "preset auto" not in done.stderr and "6 steps" in done.stderr, done.stderr
    done = program("fit", "--config", CONFIG, "--data.path", "e")
    assert done.returncode == 2 and "e has no token shards: give --data.source TEXT" in done.stderr
    assert not (tmp_path / "e").exists()
