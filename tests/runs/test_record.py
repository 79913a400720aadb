"""Runs read from their folders, and the groups that they are of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from environment import FIXTURES, ROOT
from run_folders import TOKENS, write_run

from lit_gpt.errors import UserError
from lit_gpt.runs.groups import differing_keys, group_runs, shown_value
from lit_gpt.runs.record import CurvePoint, flat_config, read_run


def test_a_run_is_read_from_its_folder_or_a_checkpoint_in_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "version_0", [3.0, 2.0, 2.5], checkpoint=FIXTURES / "modern.ckpt")
    run = read_run(folder)
    assert run.finished and run.steps == 30 and run.tokens == 3 * TOKENS and run.peak_memory == 1 << 20
    assert run.curve[0] == CurvePoint(10, 1.5, TOKENS, 1e6, 3.0, 1.5)
    assert run.checkpoint == folder / "checkpoints/best.ckpt"
    assert run.point == run.curve[1], "best.ckpt is of the lowest loss"
    last = folder / "checkpoints/last.ckpt"
    last.write_bytes(b"")
    named = read_run(last)
    assert named.folder == folder and named.checkpoint == last and named.point == named.curve[2]
    assert flat_config(run.config)["model.optimizer.lr"] == 0.001


def test_a_run_that_goes_on_is_read_too(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "version_0", [3.0], finished=False))
    assert not run.finished and run.checkpoint is None and run.steps == 10
    assert not read_run(write_run(tmp_path / "version_1", [], finished=False)).curve


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "version_0")
    script = (
        f"import sys\nfrom pathlib import Path\nfrom lit_gpt.runs.record import read_run\n"
        f"assert read_run(Path({str(folder)!r})).finished\n"
        "heavy = {'torch', 'lightning', 'numpy', 'tensorboard'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("- 1\n", "holds no options"),
        ("a: [1\n", "is no YAML"),
        ("\xff", "holds no options"),
        ("a: 2026-99-99\n", "is no YAML"),
        ("a: &a\n  b: *a\n", "than any run writes"),
        ("x: " + "a" * (1 << 20), "larger than 1 MiB"),
    ],
    ids=["list", "broken", "text", "date", "endless", "large"],
)
def test_a_damaged_configuration_is_one_line(tmp_path: Path, config: str, message: str) -> None:
    folder = write_run(tmp_path / "version_0")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=message) as error:
        flat_config(read_run(folder).config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no run: give a folder with a config\.yaml"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is no run"):
        read_run(FIXTURES / "modern.ckpt")


def test_runs_that_differ_in_their_seeds_only_are_one_group(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / str(number), seed=seed, model__optimizer__lr=lr, **changes))
        for number, (seed, lr, changes) in enumerate([
            (1, 0.001, {}),
            (2, 0.001, {"ckpt_path": "last.ckpt", "trainer__default_root_dir": "elsewhere"}),
            (1, 0.003, {}),
            (2, 0.003, {"samples__prompts": ["x"], "data__seed": 7}),
            (3, 1e-3, {"model__config__n_layer": 4}),
        ])
    ]  # fmt: skip
    differing = differing_keys(runs)
    assert set(differing) == {
        "seed_everything", "data.seed", "ckpt_path", "trainer.default_root_dir", "samples.prompts",
        "model.optimizer.lr", "model.config.n_layer",
    }  # fmt: skip
    groups = group_runs(runs, differing)
    assert [(group.name, group.members) for group in groups] == [("A", (0, 1)), ("B", (2, 3)), ("C", (4,))]
    assert [group.label for group in groups] == ["n_layer=2, lr=0.001", "n_layer=2, lr=0.003", "n_layer=4, lr=0.001"]
    with pytest.raises(UserError, match="is the same run as"):
        group_runs([runs[0], runs[0]], {})


def test_keys_of_one_name_are_told_apart_and_values_stay_short(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / str(lr), model__optimizer__lr=lr, model__lora={"lr": lr}, lr=lr))
        for lr in (0.5, 1.0)
    ]
    (group, _) = group_runs(runs, differing_keys(runs))
    assert group.label == "lr=0.5, optimizer.lr=0.5, lora.lr=0.5"
    assert shown_value("a\nb\x1b" + "c" * 100) == "a b " + "c" * 53 + "…"
    assert shown_value(1.0) == "1" and shown_value([1, "a"]) == '[1, "a"]' and shown_value(None) == "null"
