"""configs/products.yaml: the transformer book's demo, from the made names to continued ones, in a short form."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from environment import ROOT, RunProgram

from lit_gpt.model.config import GPTConfig

SCRIPT = ROOT / "scripts" / "make_products.py"


@pytest.fixture(scope="module")
def products() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_products", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_names_repeat_and_differ(products: ModuleType) -> None:
    names = products.draw_names(2000, 3)
    assert names == products.draw_names(2000, 3) != products.draw_names(2000, 4)
    assert len(set(names)) == 2000 and all("\n" not in name and name == name.strip() for name in names)
    brands = {brand for line in products.BRANDS_OF.values() for brand in line.split()}
    assert products.BRANDS_OF.keys() == products.KINDS.keys()
    for brand in ("农夫山泉", "可口可乐", "奥利奥", "蒙牛"):
        assert brand in brands and sum(name.startswith(brand) for name in names) in (
            2000 // len(brands),
            2000 // len(brands) + 1,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "reason"), [("0", "must be above zero"), ("1000000", "there are at most 16,320 names")]
)
def test_counts_that_cannot_be(lines: str, reason: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--lines", lines], capture_output=True, text=True)
    assert done.returncode == 2 and reason in done.stderr.splitlines()[-1] and not done.stdout


def test_the_model_is_the_book_s() -> None:
    config = GPTConfig.from_preset("transformer-book")
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.head_size) == (6, 4, 80, 128, 20)
    assert (config.position, config.mlp, config.head_bias, config.qkv_bias) == ("sinusoidal", "relu", True, False)


@pytest.mark.slow
def test_four_brands_are_continued(tmp_path: Path, program: RunProgram, products: ModuleType) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "products.txt").write_text("\n".join(products.draw_names(700, 1)), "utf-8")
    short = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.tokenizer bpe:600 --samples.max_new_tokens 4"
    done = program("fit", "--config", ROOT / "configs/products.yaml", *short.split())
    assert done.returncode == 0, done.stderr
    starts = ("农夫山泉", "可口可乐", "奥利奥", "蒙牛")
    words = [word for start in starts for word in ("--start", start)]
    done = program("predict", "--ckpt_path", "last", *words, "--max_new_tokens", "12", "--temperature", "0.8")
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(start) >= 1 for start in starts] == [True] * 4


@pytest.mark.slow
def test_the_names_have_to_be_made_first(tmp_path: Path, program: RunProgram) -> None:
    done = program("fit", "--config", ROOT / "configs/products.yaml")
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert done.returncode == 2 and "data/products.txt" in line
