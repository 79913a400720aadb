"""Adapters in PEFT's format: PEFT loads ours over the exported base, and we load PEFT's, to the same logits."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt.convert.adapters import Adapter, merged
from lit_gpt.convert.peft import model_type_of, write_peft
from lit_gpt.convert.recognise import load_source, open_adapter, open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT
from lit_gpt.model.lora import AdapterWeights, Factor, LoRAConfig, LoRALinear, add_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.slow

SIZE: dict[str, Any] = {"vocab_size": 97, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
ROPE = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu"}
NO_BIAS = {"qkv_bias": False, "proj_bias": False, "mlp_bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "qwen3": {**ROPE, **NO_BIAS, "n_kv_head": 2, "qk_norm": True, "tie_embeddings": False},
    "llama": {**ROPE, **NO_BIAS, "n_kv_head": 2},
    "phi3": {**ROPE, **NO_BIAS, "n_kv_head": 2, "rotary_dim": 4, "tie_embeddings": False},
    "gpt_neox": {"position": "rope", "parallel_residual": True, "mlp": "gelu", "tie_embeddings": False},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceCheckpoint, Path]:
    """A random model of ours, and the folder that transformers loads."""
    from lit_gpt.checkpoint.format import save_model
    from lit_gpt.model.config import GPTConfig

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZE, **FAMILIES[request.param]}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(folder / "base.ckpt", model, None)
    source = open_source(str(folder / "base.ckpt"))
    assert model_type_of(source) == request.param
    write_hf(source, folder / "hf")
    return source, folder / "hf"


def random_adapter(source: SourceCheckpoint, lora: LoRAConfig, name: str = "ours") -> Adapter:
    model = source.load()
    torch.manual_seed(1)
    add_lora(model, source.config, lora)
    factors = {n: m.factors() for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for factor in (factor for layer in factors.values() for factor in layer):
        torch.nn.init.normal_(factor.b, std=0.2)
    found = {n: tuple(Factor(f.a.detach(), f.b.detach(), f.scale, f.start) for f in fs) for n, fs in factors.items()}
    return Adapter(name, source.config, None, AdapterWeights(found), lora.rank_stabilized)


def ids() -> torch.Tensor:
    return torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(2))


@cache
def _loaded(hf: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)


def theirs(hf: Path) -> Any:
    """The base in transformers, loaded once: PEFT and more rows change the copy."""
    return copy.deepcopy(_loaded(hf))


def logits_of_peft(hf: Path, adapter: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(theirs(hf), adapter).eval()
    with torch.no_grad():
        return model(ids()).logits


def ours(source: SourceCheckpoint) -> torch.Tensor:
    with torch.no_grad():
        return source.load().float()(ids()).logits


@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(rank=4, alpha=6.0),
        LoRAConfig(rank=2, alpha=3.0, targets="c_attn.q,c_attn.v,c_fc", rank_stabilized=True),
        LoRAConfig(rank=3, targets="h.1.attn.c_attn.k,h.0.mlp.c_proj"),
    ],
    ids=["all", "parts", "single"],
)
def test_peft_loads_ours_and_we_load_what_it_saves(
    base: tuple[SourceCheckpoint, Path], lora: LoRAConfig, tmp_path: Path
) -> None:
    source, hf = base
    adapter = random_adapter(source, lora)
    write_peft(adapter, source, tmp_path / "peft")
    expected = ours(merged(source, adapter))
    assert (expected - ours(source)).abs().max() > 0.1
    torch.testing.assert_close(logits_of_peft(hf, tmp_path / "peft"), expected, rtol=0, atol=1e-5)
    again = open_adapter(str(tmp_path / "peft"), source)
    torch.testing.assert_close(ours(merged(source, again)), expected, rtol=0, atol=1e-5)
    over_hf = open_adapter(str(tmp_path / "peft"), open_source(str(hf)))  # the same weights in another format
    torch.testing.assert_close(ours(merged(open_source(str(hf)), over_hf)), expected, rtol=0, atol=1e-5)


def test_we_load_what_peft_makes(base: tuple[SourceCheckpoint, Path], tmp_path: Path) -> None:
    source, hf = base
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules="all-linear",
        rank_pattern={"down_proj": 2, "h.0.mlp.c_fc": 3, r"layers\.(0|1)\.mlp\.up_proj": 3},
        alpha_pattern={"q_proj": 3, "c_attn": 5},
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(theirs(hf), config).eval()
    with torch.no_grad():
        expected = model(ids()).logits
    model.save_pretrained(tmp_path / "theirs")
    adapter = open_adapter(str(tmp_path / "theirs"), source)
    torch.testing.assert_close(ours(merged(source, adapter)), expected, rtol=0, atol=1e-5)
    write_peft(adapter, source, tmp_path / "again")
    torch.testing.assert_close(logits_of_peft(hf, tmp_path / "again"), expected, rtol=0, atol=1e-5)


def test_rows_of_new_tokens(base: tuple[SourceCheckpoint, Path], tmp_path: Path) -> None:
    """transformers makes room for them, PEFT fills it."""
    from dataclasses import replace

    source, hf = base
    adapter = random_adapter(source, LoRAConfig(rank=2))
    torch.manual_seed(5)
    names = ["wte"] if source.config.tie_embeddings else ["wte", "lm_head"]
    rows = {name: torch.randn(3, 32) for name in names}
    grown = replace(source.config, vocab_size=100)
    adapter = replace(adapter, config=grown, weights=AdapterWeights(adapter.weights.factors, rows, 97))
    write_peft(adapter, source, tmp_path / "peft")
    model = theirs(hf)
    model.resize_token_embeddings(100, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    x = torch.cat([ids(), torch.tensor([[97, 98, 99]] * 2)], 1)
    with torch.no_grad():
        expected = model(x).logits
        found = merged(source, adapter).load()(x).logits
        again = merged(source, open_adapter(str(tmp_path / "peft"), source)).load()(x).logits
    assert found.shape[-1] == 100
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(again, found)


def test_merged_checkpoints_of_both_formats(base: tuple[SourceCheckpoint, Path], tmp_path: Path) -> None:
    source, _ = base
    adapter = random_adapter(source, LoRAConfig(rank=2))
    both = merged(source, adapter)
    write_lit_gpt(both, tmp_path / "merged.ckpt")
    write_hf(both, tmp_path / "merged")
    model, _ = load_source(str(tmp_path / "merged.ckpt"))
    with torch.no_grad():
        expected = model(ids()).logits
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        found = exported.eval()(ids()).logits
    torch.testing.assert_close(ours(both), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def _edited(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not LORA"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=.* changes its base"),
        ({"rank_pattern": {"(a+)+$": 3}}, "the pattern .* is not read"),
        ({"rank_pattern": {"mlp.c_fc": 5}}, "is not of rank 5"),
        ({"r": "x"}, "adapter_config.json"),
        ({"r": 0, "rank_pattern": {"c_fc": -1}}, "a rank below 1"),
    ],
)
def test_what_is_more_than_lora_is_refused(
    values: dict[str, Any], message: str, small: tuple[SourceCheckpoint, Path], tmp_path: Path
) -> None:
    source, folder = small
    shutil.copytree(folder, tmp_path / "peft")
    with pytest.raises(UserError, match=message):
        open_adapter(str(_edited(tmp_path / "peft", **values)), source)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceCheckpoint, Path]:
    """A GPT-2, and an adapter of it; not to be changed."""
    from lit_gpt.checkpoint.format import save_model
    from lit_gpt.model.config import GPTConfig

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    save_model(folder / "base.ckpt", GPT(GPTConfig(**SIZE)), None)
    source = open_source(str(folder / "base.ckpt"))
    write_peft(random_adapter(source, LoRAConfig(rank=2)), source, folder / "peft")
    return source, folder / "peft"


def test_damaged_weights_and_another_base_are_refused(small: tuple[SourceCheckpoint, Path], tmp_path: Path) -> None:
    from lit_gpt.checkpoint.format import save_model
    from lit_gpt.model.config import GPTConfig

    source, folder = small[0], Path(shutil.copytree(small[1], tmp_path / "peft"))
    file = folder / "adapter_model.safetensors"
    good, key = load_file(file), "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    for change, message in [
        ({key: None}, "only one half of a term"),
        ({key: torch.zeros(2, 31)}, "does not fit its weight"),
        ({key: torch.full((2, 32), torch.nan)}, "holds NaN or infinity in h.0.mlp.c_fc"),
        ({"base_model.model.transformer.h.0.mlp.c_xy.lora_A.weight": torch.zeros(2, 32)}, "has terms for .*c_xy"),
        ({"base_model.model.transformer.wte.weight": torch.zeros(97, 32)}, "transformer.wte.weight, which is no low"),
    ]:
        save_file({name: t for name, t in {**good, **change}.items() if t is not None}, file)
        with pytest.raises(UserError, match=message):
            open_adapter(str(folder), source)
    torch.manual_seed(9)
    write_peft(random_adapter(source, LoRAConfig(rank=2)), source, tmp_path / "peft2")
    save_model(tmp_path / "other.ckpt", GPT(GPTConfig(**SIZE)), None)
    with pytest.raises(UserError, match=r"was trained on another base than .*other\.ckpt"):
        open_adapter(str(tmp_path / "peft2"), open_source(str(tmp_path / "other.ckpt")))
