"""Damaged and hostile checkpoints: one line, soon, and without taking more memory than the file has."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import RunProgram
from fuzzing import SCALARS, changed, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.checkpoint.format import load_model, save_model
from lit_gpt.checkpoint.torch_file import called_names
from lit_gpt.convert.recognise import open_source
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer

Checkpoint = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of bytes."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16))
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    save_model(path, model, get_tokenizer("byte"))
    return path


def readers(path: Path) -> list[Callable[[], object]]:
    """Both ways in which weights are read."""
    return [lambda: load_model(path), lambda: open_source(str(path)).load()]


def refusal(path: Path) -> str:
    """The one line with which both ways refuse a file."""
    lines = []
    for read in readers(path):
        with pytest.raises(UserError) as error:
            read()
        lines.append(str(error.value))
    assert all("\n" not in line and len(line) < 400 for line in lines), lines
    return lines[0]


def rope(block_size: int) -> dict[str, Any]:
    return {"position": "rope", "block_size": block_size}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def tenfold(depth: int) -> Any:
    """A list of 10 to the power of `depth` numbers in a few hundred bytes of a file."""
    value: Any = [1] * 10
    for _ in range(depth - 1):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": "16"}, "n_embd='16' must be a whole number"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' must be a number"),
        ({"dropout": "0"}, "dropout='0' must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a number"),
        ({"norm_bias": "yes"}, "norm_bias='yes' must be true or false"),
        ({"mlp": ["gelu"]}, r"mlp=\['gelu'\] is unknown"),
        ({"rope_scaling": [1]}, "rope_scaling of rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor='2' must be a number"),
        ({"norm_eps": 10**400}, "its config holds the number"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 is too large"),
        ({"n_layer": 10**7}, "n_layer=10000000, but the file has 17 tensors"),
        ({"n_embd": 10**6}, "at least 12,000,273,000,000 weights"),
        (rope(10**9), "block_size=1000000000 needs a table of 30 GiB"),
        (rope(2**24), "a table of block_size=16777216 positions is larger than all its weights"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_config_of_other_types_or_of_a_larger_model(
    values: dict[str, Any], message: str, good: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["lit_gpt"]["config"].update(values)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "bad.ckpt")
    refusal(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("lit_gpt",), [1], "has format version None"),
        (("lit_gpt", "config"), None, "its config is missing"),
        (("lit_gpt", "config"), "gpt2", "its config is a str"),
        (("lit_gpt", "precision"), 32, "its precision is a int"),
        (("lit_gpt", "tokenizer"), "gpt2", "its tokenizer is a str"),
        (("state_dict",), "hello", "its state_dict is no dict of tensors"),
        (("state_dict",), {"model.wte.weight": "x"}, "something else than tensors"),
        (("state_dict",), {3: torch.zeros(1)}, "something else than tensors"),
        (("state_dict", "model.wte.weight"), torch.zeros(1, 1).expand(10**5, 10**5), "claims more than the file"),
        (("state_dict",), dict.fromkeys(map(str, range(9)), torch.zeros(1000, 10)), "claims more than the file"),
        (("state_dict", "model.ln_f.weight"), torch.ones(16, dtype=torch.int8), "ln_f.weight is int8, not a float"),
        (("global_step",), "3", "its global_step is a str"),
        (("hyper_parameters",), [1], "its hyper_parameters is a list"),
        (("hyper_parameters",), {"x": nested(100)}, "more or deeper values"),
        (("hyper_parameters",), {"x": tenfold(9)}, "more or deeper values"),
        (("datamodule_hyper_parameters",), {"x": torch.zeros(1)}, "holds a Tensor, no plain value"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_entries_of_other_types(path: tuple[str, ...], value: Any, message: str, good: Path, tmp_path: Path) -> None:
    checkpoint = inside = torch.load(good, weights_only=True)
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    assert message in refusal(tmp_path / "bad.ckpt")


LAST_BYTE = "/w== 255"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": "/w== 3"}, r"b'\x03' and b'\xff' have one id, 3"),
        ({"ranks": "/w== -3"}, r"the id -3 of b'\xff' is not in 0 …"),
        ({"ranks": f"/w== {2**40}"}, f"the id {2**40} of"),
        ({"ranks": "/w== 255\n/w== 256"}, "1 of its tokens are there twice"),
        ({"specials": {"a": 3}}, r"b'\x03' and 'a' have one id, 3"),
        ({"specials": {"a": "3"}}, "the id '3' of 'a' is not in"),
        ({"specials": {3: 300}}, "3 is no token"),
        ({"specials": {"": 300}}, "'' is no token"),
        ({"pattern": "("}, "tiktoken does not accept it"),
        ({"pattern": "(?:(?:(?:(?=a)a){1000}){1000}){1000}"}, "is too large"),
        ({"pattern": [1]}, "its pattern is [1]"),
        ({"bos_id": -5}, "bos_id -5 is none of its 257 ids"),
        ({"chat_template": 3}, "its chat_template is 3"),
        ({"name": None}, "its name is None"),
        ({"end_of_text": ...}, "its end_of_text is None"),  # found by fuzzing: absent, and not null
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_tokenizer_that_would_panic(
    values: dict[str, Any], message: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(good, weights_only=True)
    stored = checkpoint["lit_gpt"]["tokenizer"]
    if "ranks" in values:
        values = {"ranks": stored["ranks"].replace(LAST_BYTE, values["ranks"])}
    stored.update(values)
    for key in [key for key, value in stored.items() if value is ...]:
        del stored[key]
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    assert message in refusal(tmp_path / "bad.ckpt")
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("description", "compression", "message"),
    [
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", zipfile.ZIP_STORED, "it wants to run builtins."),
        (b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n.", zipfile.ZIP_STORED, "it wants to run torch."),
        (b"\x80\x02" + b"]0" * 600_000 + b".", zipfile.ZIP_STORED, "damaged"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", zipfile.ZIP_STORED, "damaged"),
        (b"\x80\x02X\x00\x00\x00\x04" + bytes(4 << 24) + b".", zipfile.ZIP_DEFLATED, "damaged"),
    ],
    ids=["bytearray of 2 GB", "tensors without data", "a million steps", "a memo of 2 G", "64 MB in 64 kB"],
)
def test_a_description_that_takes_more_than_the_file_has(
    description: bytes, compression: int, message: str, good: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "bad.ckpt", "w", compression) as new:
        for record in old.infolist():
            new.writestr(record.filename, description if record.filename.endswith(".pkl") else old.read(record))
    assert message in refusal(tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    "content",
    [
        {3: 1, "x\n" * 1000: 2},
        {1: 2, "tok_emb.weight": torch.zeros(4, 4)},
        {"model": {"a": torch.zeros(1)}, "model_args": dict.fromkeys(("n_layer", "n_head", "n_embd"), 10**7)},
        {
            "model": {"a": torch.zeros(1)},
            "model_args": {
                "vocab_size": 1,
                "bias": 1,
                **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"), 9999),
            },
        },
        {
            "model_state_dict": {"a": torch.zeros(1)},
            "h_params": {
                **dict.fromkeys(("context_length", "d_model", "num_heads"), 10**5),
                "num_blocks": 3,
                "max_token_value": 3,
            },
        },
        {
            "tok_emb.weight": torch.zeros(4, 768),
            "pos_emb.weight": torch.zeros(4, 4),
            "trf_blocks.0.ff.layers.0.weight": torch.zeros(4, 4),
            "trf_blocks.x": torch.zeros(1),
        },
    ],
    ids=["keys", "keys of a book", "arguments missing", "arguments of another model", "h_params", "block x"],
)
def test_hostile_checkpoints_of_other_projects(content: Checkpoint, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / "bad.pt"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_program_ends_with_status_2(good: Path, tmp_path: Path, program: RunProgram) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["lit_gpt"]["config"]["norm_eps"] = "1e-5"
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    done = program("convert", "bad.ckpt", "out.ckpt")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out.ckpt").exists()


def test_a_model_in_use_does_not_change_with_its_file(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "served.ckpt"
    for load in (lambda: load_model(path)[0], lambda: open_source(str(path)).load()):
        path.write_bytes(good.read_bytes())
        model = load()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path.write_bytes(bytes(path.stat().st_size))  # in place, as `cp` does; mapped weights would be zero now
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        path.write_bytes(b"")  # and now there would be nothing to map
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.lm_head.weight is model.wte.weight


def test_names_in_a_pickle_are_found_without_running_it() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps([print, {"a": open}], protocol)
        names = {name.rpartition(".")[2] for name in called_names(io.BytesIO(content))}
        assert names == {"print", "open"}


# Fuzzing -------------------------------------------------------------------------------------------------------------


def read_or_refuse(path: Path) -> None:
    for read in readers(path):
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 3000


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_fuzz_bytes_of_a_checkpoint(data: st.DataObject, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(data.draw(damaged(good.read_bytes(), data.draw(st.sampled_from([6000, None])))))
    read_or_refuse(path)


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_fuzz_values_of_a_checkpoint(
    data: st.DataObject, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["lit_gpt"] = data.draw(changed(copy.deepcopy(checkpoint["lit_gpt"])))
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    read_or_refuse(tmp_path / "bad.ckpt")
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.slow
@fuzz
@given(values=st.dictionaries(st.sampled_from(sorted(GPTConfig().to_dict())), SCALARS | st.integers(1, 64), max_size=4))
def test_fuzz_a_config(values: dict[str, Any]) -> None:
    try:
        config = GPTConfig.from_dict(values)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert GPTConfig.from_dict(config.to_dict()) == config
