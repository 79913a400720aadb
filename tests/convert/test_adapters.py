"""Adapters of ours over a base: merged, hashed, and whatever is damaged or hostile refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import save_adapter, save_base

from lit_gpt.checkpoint.format import KEY, load_checkpoint, save_checkpoint
from lit_gpt.convert.adapter_set import open_adapters, parse_adapters
from lit_gpt.convert.recognise import load_source, open_adapter, open_source
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.model.lora import LoRAConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base.ckpt")


@pytest.fixture(scope="module")
def good(base: Path) -> Path:
    """An adapter of it that opens."""
    path = save_adapter(base.with_name("good.ckpt"), base, 1)
    open_adapter(str(path), open_source(str(base)))
    return path


def test_the_hash_is_of_values_and_not_of_files(base: Path, tmp_path: Path) -> None:
    source = open_source(str(base))
    write_hf(source, tmp_path / "hf")
    write_lit_gpt(source.to("bfloat16"), tmp_path / "rounded.ckpt")
    found = open_source(str(tmp_path / "hf")).weights_sha256
    assert found == source.weights_sha256
    assert open_source(str(tmp_path / "rounded.ckpt")).weights_sha256 != found
    write_lit_gpt(open_source(str(tmp_path / "rounded.ckpt")).to("float32"), tmp_path / "widened.ckpt")
    hashes = {open_source(str(tmp_path / f"{name}.ckpt")).weights_sha256 for name in ("rounded", "widened")}
    assert len(hashes) == 1
    assert open_source(str(save_base(tmp_path / "other.ckpt", seed=1))).weights_sha256 != found


def test_the_base_is_left_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a.ckpt", base, 1, LoRAConfig(rank=2, targets="c_attn.v"))
    before, (merged, _) = load_source(str(base))[0].state_dict(), load_source(str(adapter))
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"}
    source = open_source(str(adapter))
    assert source.is_adapter and source.weights_sha256 == open_source(str(adapter)).weights_sha256
    assert all(torch.equal(before[name], tensor) for name, tensor in load_source(str(base))[0].state_dict().items())


def _config(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint[KEY]["config"].update(values)


def _entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint[KEY]["adapter"].update(values)


def _tensor(name: str, tensor: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["state_dict"].update({f"model.{name}": tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(n_layer=10**9), "is for a model of n_layer=1000000000"),
        (_config(block_size=10**6), "is for a model of block_size=1000000"),
        (_config(vocab_size=10**9), "lacks the rows of new tokens"),
        (_config(padded_vocab_size=10**9), "padded_vocab_size=1000000000 is far above its vocabulary"),
        (_entry(base_sha256="0" * 64), "was trained on another base"),
        (_entry(lora={"rank": 3}), "it is damaged|: damaged"),
        (_entry(lora={"rank": 10**9}), "it is damaged|: damaged"),
        (_entry(base=""), "its base is '', no path and no id"),
        (_tensor("h.0.attn.c_attn.parts.all.a", torch.zeros(2, 31)), "does not fit its weight"),
        (_tensor("h.0.attn.c_attn.parts.all.b", torch.full((96, 2), torch.inf)), "holds NaN or infinity in h.0.attn"),
        (_tensor("h.9.attn.c_attn.parts.all.a", torch.zeros(2, 32)), "no part of its adapter: it is damaged"),
        (_tensor("wte.rows", torch.zeros(2, 32)), "do not fit: it is damaged"),
        (_tensor("wte.rows", torch.zeros(2, 31)), "no part of its adapter: it is damaged"),
        (_tensor("ln_f.weight", torch.zeros(32)), "no part of its adapter: it is damaged"),
    ],
)
def test_a_damaged_adapter_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, base: Path, good: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(good)
    change(checkpoint)
    save_checkpoint(tmp_path / "b.ckpt", checkpoint)
    with pytest.raises(UserError, match=message):
        open_adapter(str(tmp_path / "b.ckpt"), open_source(str(base)))
    with pytest.raises(UserError):
        open_source(str(tmp_path / "b.ckpt"))


def test_an_adapter_that_names_itself_as_its_base(base: Path, tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "a.ckpt", base, 1)
    checkpoint = load_checkpoint(path)
    checkpoint[KEY]["adapter"]["base"] = str(tmp_path / "b.ckpt")
    save_checkpoint(tmp_path / "b.ckpt", checkpoint)
    with pytest.raises(UserError, match=r"b\.ckpt is an adapter itself"):
        open_source(str(tmp_path / "b.ckpt"))


def test_names_on_the_command_line() -> None:
    assert parse_adapters(["a=x=y.ckpt", "b-1.2=z"]) == {"a": "x=y.ckpt", "b-1.2": "z"}
    for words, message in [
        (["a"], "is not NAME=PATH"),
        (["=x"], "is no name"),
        (["a="], "is not NAME=PATH"),
        (["../a=x"], "is no name"),
        (["a=x", "a=y"], r'two adapters "a" \(x and y\)'),
    ]:
        with pytest.raises(UserError, match=message):
            parse_adapters(words)


def test_adapters_with_other_new_tokens_are_not_served_together(base: Path, tmp_path: Path) -> None:
    paths = {
        "chat": str(save_adapter(tmp_path / "chat.ckpt", base, 1, chat=True)),
        "chat2": str(save_adapter(tmp_path / "chat2.ckpt", base, 2, chat=True)),
        "plain": str(save_adapter(tmp_path / "plain.ckpt", base, 3)),
    }
    found = open_adapters(paths, open_source(str(base)))
    assert found.config.vocab_size == 259 and found.tokenizer is not None and found.tokenizer.n_vocab == 259
    checkpoint = load_checkpoint(paths["chat2"])
    checkpoint["state_dict"]["model.wte.rows"] = torch.zeros(1, 32)
    checkpoint[KEY]["config"]["vocab_size"] = 258
    checkpoint[KEY]["tokenizer"] = None
    save_checkpoint(paths["chat2"], checkpoint)
    with pytest.raises(UserError, match="the adapters chat and chat2 have different new tokens"):
        open_adapters(paths, open_source(str(base)))
