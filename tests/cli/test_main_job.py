"""The main job as a user does it: prepare → fit → validate → predict, through the program, on real text."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

import pytest
import torch

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import read_header, read_weights

SMALL = """
model:
  preset: nano
  config: {n_layer: 2, n_head: 2, n_embd: 32, block_size: 32}
  optimizer: {lr: 0.01}
data: {batch_size: 8, source: text.py, path: tokens, tokenizer: char, val_split: "tail:0.1"}
trainer:
  accelerator: cpu
  precision: 32-true
  max_steps: 20
  val_check_interval: 10
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 5
  enable_progress_bar: false
samples: {prompts: ["def "], max_new_tokens: 20, print_at_end: 2}
"""


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can do it")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ten steps; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "small.yaml", "--trainer.max_steps", "10"]) == 0
    return folder


@pytest.fixture
def after_ten_steps(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_inputs(folder: Path) -> None:
    text = Path(str(string.__file__)).read_text("utf-8") + "你好，世界🙂"
    (folder / "text.py").write_text(text, "utf-8")
    (folder / "small.yaml").write_text(SMALL)


def figures(printed: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split() for line in printed.splitlines())}


@pytest.mark.slow
def test_fit_alone_prepares_trains_validates_samples_and_leaves_a_checkpoint_that_is_enough(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", "--config", "small.yaml"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("--- sample") == 2
    assert "lit_gpt predict --ckpt_path" in printed.out, "what to try next"
    assert "tensorboard --logdir" in printed.err
    run = folder / "lightning_logs/version_0"
    assert {"config.yaml", "checkpoints"} <= {path.name for path in run.iterdir()}
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert best["lit_gpt"]["precision_reason"] == "as asked for"
    told = [float(c["best_model_score"]) for n, c in best["callbacks"].items() if "val/loss" in n]

    assert main(["validate", "--ckpt_path", str(run / "checkpoints/best.ckpt")]) == 0
    found = figures(capsys.readouterr().out)
    assert found["val/loss"] == pytest.approx(told[0], rel=1e-6), "validate reports what fit reported"
    assert found["val/bits_per_byte"] > 0

    # Elsewhere, with the data gone, the checkpoint is enough.
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    (folder / "tokens").rename(folder / "gone")
    options = ["--start", "def ", "--start", "世", "--num_samples", "2", "--max_new_tokens", "40", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert main(["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1], "one seed, one text"
    assert texts[0].count("def ") >= 2
    assert texts[0].count("世") >= 2


@pytest.mark.slow
def test_a_checkpoint_fixes_the_model_but_not_the_training(
    after_ten_steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = after_ten_steps / "lightning_logs"
    last = logs / "version_0/checkpoints/last.ckpt"
    assert read_header(last).config.n_embd == 32
    capsys.readouterr()
    assert main(["fit", "--config", "small.yaml", "--ckpt_path", "last", "--model.config.n_layer", "3"]) == 2
    assert "model.config.n_layer=3 differs from the checkpoint's 2" in capsys.readouterr().err
    assert main(["fit", "--config", "small.yaml", "--ckpt_path", "last", "--trainer.precision", "bf16-mixed"]) == 2
    assert "trainer.precision=bf16-mixed differs from the run's 32-true" in capsys.readouterr().err
    assert main(["fit", "--config", "small.yaml", "--ckpt_path", "last", "--trainer.max_steps", "12"]) == 0
    assert read_header(last).step == 12
    assert [path.name for path in logs.iterdir()] == ["version_0"], "it goes on in its folder"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.devices", "10000"], "trainer.devices=10000: this machine has"),
        (
            ["--data.batch_size", "3", "--trainer.devices", "2"],
            "data.batch_size=3 can't be divided among 2 ranks: take 4",
        ),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches=0 must be at least 1"),
        (["--trainer.num_nodes", "0"], "num_nodes=0 must be at least 1"),
        (["--trainer.strategy", "dpp"], "dpp"),
        pytest.param(["--trainer.strategy", "fsdp"], "fsdp", marks=no_gpu),
        pytest.param(["--trainer.accelerator", "gpu"], "trainer.accelerator=gpu: this machine has none", marks=no_gpu),
    ],
    ids=str,
)
def test_what_the_machine_or_the_batch_cannot_do_is_refused_before_any_work(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "small.yaml", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("lit_gpt: error: ")
    assert not (folder / "lightning_logs").exists()


@pytest.mark.slow
def test_fine_tuning_has_the_weights_shape_and_tokenizer_and_starts_anew(
    after_ten_steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = after_ten_steps / "lightning_logs/version_0/checkpoints/last.ckpt"
    Path("other.txt").write_text("import string\n你好\n" * 100, "utf-8")
    tuned = ["--init_from", str(first), "--data.path", "other", "--data.source", "other.txt"]
    rest = "--model.optimizer.lr 0 --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.precision 32-true"
    shown = "--trainer.enable_progress_bar false --trainer.check_val_every_n_epoch null --data.batch_size 4"
    assert main(["fit", *tuned, *f"{rest} {shown} --trainer.accelerator cpu --model.schedule.warmup 0".split()]) == 0
    second = after_ten_steps / "lightning_logs/version_1/checkpoints/last.ckpt"
    before, after = read_header(first), read_header(second)
    assert (after.config, after.step) == (before.config, 2)
    assert after.tokenizer == before.tokenizer
    torch.testing.assert_close(read_weights(second), read_weights(first))  # a rate of 0 leaves them where they began


@pytest.mark.slow
def test_validate_writes_to_no_folder_that_only_the_checkpoint_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "small.yaml", "--trainer.max_steps", "10"]) == 0
    path = Path(read_header(folder / "lightning_logs/version_0/checkpoints/last.ckpt").data["path"])
    path.rename("moved")
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", "last"]) == 2
    assert "which the checkpoint names, has no token shards" in capsys.readouterr().err
    assert not path.exists()
    assert main(["validate", "--ckpt_path", "last", "--data.path", "moved"]) == 0


@pytest.mark.slow
def test_data_of_another_tokenizer_is_refused(after_ten_steps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "text.py", "--output", "other", "--tokenizer", "byte"]) == 0
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", "last", "--data.path", "other"]) == 2
    error = capsys.readouterr().err
    assert "holds shards of the tokenizer byte" in error.strip().splitlines()[-1]


@pytest.mark.slow
def test_precedence_is_preset_then_environment_then_file_then_flag(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("preset.yaml").write_text("model: {preset: nano, config: {n_embd: 48}}\n")
    monkeypatch.setenv("LIT_GPT_FIT__MODEL__CONFIG__N_EMBD", "32")
    monkeypatch.setenv("LIT_GPT_FIT__MODEL__CONFIG__N_LAYER", "3")
    monkeypatch.setenv("LIT_GPT_FIT__MODEL__CONFIG__N_HEAD", "2")
    arguments = ["fit", "--config", "preset.yaml", "--model.config.n_head", "6", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for line in ("position: rope", "n_layer: 3", "n_embd: 48", "n_head: 6"):
        assert f"\n    {line}\n" in printed
