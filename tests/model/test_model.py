"""The model against its published counts, transformers, finite differences and itself with a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from models import tiny_gpt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache

COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llms-from-scratch-124m": 163_009_536,
}
SHAPES: list[dict[str, Any]] = [
    {"position": "learned"},
    {"position": "sinusoidal", "mlp": "relu", "tie_embeddings": False, "head_bias": True},
    {
        "position": "rope",
        "n_kv_head": 2,
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "qkv_bias": False,
        "proj_bias": False,
    },
    {
        "position": "rope",
        "n_kv_head": 1,
        "mlp": "relu2",
        "qk_norm": True,
        "logit_softcap": 15.0,
        "head_dim": 6,
    },
    {"position": "learned", "mlp": "gelu", "norm_bias": False, "padded_vocab_size": 64, "mlp_bias": False},
    {"position": "rope", "rotary_dim": 2, "parallel_residual": True, "sliding_window": 3},
    {
        "position": "rope",
        "norm": "rmsnorm",
        "norm_unit_offset": True,
        "block_norm": "both",
        "mlp": "geglu_tanh",
        "sliding_window": 4,
        "global_layers": [0],
        "rope_local_theta": 100.0,
        "qk_norm": True,
        "attn_scale": 0.3,
        "scale_embeddings": True,
    },
    {
        "position": "rope",
        "norm": "rmsnorm",
        "block_norm": "post",
        "n_kv_head": 2,
        "qk_norm": True,
        "qk_norm_full": True,
    },
]


small = partial(tiny_gpt, vocab_size=50, std=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("preset", COUNTS)
def test_presets_have_their_published_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_preset(preset))
    assert sum(p.numel() for p in model.parameters()) == COUNTS[preset]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_equals_uncached_with_slots_of_different_lengths(shape: dict[str, Any]) -> None:
    model = small(**shape)
    idx = torch.randint(50, (3, 14), generator=torch.Generator().manual_seed(1))
    expected = model(idx).logits
    cache = KVCache(model.config, 5, 32, torch.float64)
    slots = [4, 1, 2]  # neither sorted nor contiguous
    for slot, prompt, ids in zip(slots, (3, 9, 6), idx):
        model(ids[None, :prompt], cache=cache.step([slot], prompt))
        cache.extend([slot], prompt)
    for _ in range(5):  # ragged decode: each sequence is at its own position
        lengths = [cache.lengths[slot] for slot in slots]
        fed = torch.stack([idx[i, n] for i, n in enumerate(lengths)])[:, None]
        got = model(fed, cache=cache.step(slots, 1)).logits
        cache.extend(slots, 1)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(got[i, 0], expected[i, n])


@pytest.mark.parametrize("window", [1, 3, 9, 10, 11])
def test_a_window_ends_what_a_token_depends_on(window: int) -> None:
    """In one layer the logits of a position depend on the last `window` tokens, and on no other."""
    model = small(position="rope", n_layer=1, sliding_window=window)
    idx = torch.randint(50, (1, 10), generator=torch.Generator().manual_seed(4))
    expected = model(idx).logits[0]
    for changed in range(10):
        other = idx.clone()
        other[0, changed] = (idx[0, changed] + 1) % 50
        differs = (model(other).logits[0] != expected).any(-1)
        assert differs.tolist() == [changed <= t < changed + window for t in range(10)]


def test_a_window_in_some_layers_reaches_what_the_others_see() -> None:
    model = small(position="rope", n_layer=2, sliding_window=2, global_layers=[0])
    idx = torch.randint(50, (1, 10), generator=torch.Generator().manual_seed(4))
    other = idx.clone()
    other[0, 0] = (idx[0, 0] + 1) % 50
    assert (model(other).logits[0] != model(idx).logits[0]).any(-1).all()


@pytest.mark.parametrize("window", [None, 3])
def test_right_padding_in_a_ragged_step_is_never_seen(window: int | None) -> None:
    model = small(position="rope", sliding_window=window)
    idx = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(2))
    expected = model(idx).logits
    cache = KVCache(model.config, 2, 32, torch.float64)
    padded = idx[:, :6].clone()
    padded[0, 4:] = 7  # row 0 feeds four tokens, row 1 six
    model(padded, cache=cache.step([0, 1], 6))
    cache.extend([0, 1], [4, 6])
    assert cache.lengths == [4, 6]
    got = model(torch.stack([idx[0, 4:6], idx[1, 6:8]]), cache=cache.step([0, 1], 2)).logits
    torch.testing.assert_close(got[0], expected[0, 4:6])
    torch.testing.assert_close(got[1], expected[1, 6:8])


def test_truncate_and_copy_branch_a_sequence() -> None:
    model = small(position="rope", n_kv_head=2)
    idx = torch.randint(50, (1, 10), generator=torch.Generator().manual_seed(3))
    cache = KVCache(model.config, 2, 32, torch.float64)
    model(idx, cache=cache.step([0], 10))
    cache.extend([0], 10)
    cache.copy(0, 1, length=6)
    cache.truncate(0, 6)
    other = torch.randint(50, (2, 2))
    got = model(other, cache=cache.step([0, 1], 2)).logits
    for slot in range(2):
        torch.testing.assert_close(got[slot], model(torch.cat([idx[:, :6], other[slot : slot + 1]], 1)).logits[0, -2:])


def test_a_slot_that_is_full_is_refused() -> None:
    cache = KVCache(small().config, 1, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        cache.step([0], 9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_the_cross_entropy_of_the_logits(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(**shape)
    idx = torch.randint(50, (2, 16))
    targets = torch.randint(50, (2, 16))
    targets[1, 10:] = IGNORE_INDEX
    expected = torch.nn.functional.cross_entropy(
        model(idx).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    (expected_gradient,) = torch.autograd.grad(expected, [model.wte.weight])
    for chunk_bytes in (1 << 30, 4 * 64 * 5):  # one chunk, and chunks of five rows or so
        monkeypatch.setattr("lit_gpt.model.gpt.CHUNK_BYTES", chunk_bytes)
        output = model(idx, targets)
        assert output.logits is None and output.hidden is None
        (gradient,) = torch.autograd.grad(output.loss_sum, [model.wte.weight])
        assert output.n_targets.item() == 26
        torch.testing.assert_close(output.loss_sum.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_finite_differences(shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = GPTConfig(
        **{
            **shape,
            "vocab_size": 7,
            "padded_vocab_size": 8,
            "block_size": 4,
            "n_layer": 1,
            "n_embd": 8,
            "n_head": 4,
        }
    )
    model = GPT(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    idx, targets = torch.randint(7, (2, 4)), torch.randint(7, (2, 4))
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, values)), (idx, targets)).loss_sum

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


def test_padded_vocabulary_changes_nothing_but_the_matrix() -> None:
    plain, padded = small(), small(padded_vocab_size=64)
    state = plain.state_dict()
    for name in ("wte.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.full((14, 32), 9.0)])
    padded.load_state_dict(state)
    idx = torch.randint(50, (2, 8))
    torch.testing.assert_close(padded(idx).logits, plain(idx).logits)
    torch.testing.assert_close(padded(idx, idx).loss_sum, plain(idx, idx).loss_sum)


def test_initialisation_is_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert model.h[7].attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert not model.h[0].mlp.c_fc.bias.any()


def test_last_only_and_return_hidden() -> None:
    model = small()
    idx = torch.randint(50, (2, 8))
    logits, hidden, *others = model(idx, return_hidden=True)
    assert all(other is None for other in others)
    last = model(idx, last_only=True)
    assert last.hidden is None
    torch.testing.assert_close(last.logits, logits[:, -1:])
    torch.testing.assert_close(model.lm_head(hidden), logits)
    torch.testing.assert_close(model(idx, last_only=torch.tensor([2, 5])).logits[:, 0], logits[[0, 1], [2, 5]])
    with_targets = model(idx, idx, return_hidden=True)
    assert with_targets.logits is None
    torch.testing.assert_close(with_targets.hidden, hidden)


@pytest.mark.parametrize(
    "probabilities", [{"dropout": 0.5}, {"dropout": 0.5, "attn_dropout": 0.0}, {"attn_dropout": 0.5}]
)
def test_dropout_acts_in_training_only(probabilities: dict[str, float]) -> None:
    model = small(**probabilities)
    assert model.h[0].attn.dropout == probabilities.get("attn_dropout", 0.5)
    assert all(
        isinstance(layer, torch.nn.Dropout) == ("dropout" in probabilities) for layer in (model.drop, model.h[0].drop)
    )
    idx = torch.randint(50, (1, 8))
    torch.testing.assert_close(model(idx).logits, model(idx).logits)
    model.train()
    assert not torch.equal(model(idx).logits, model(idx).logits)


def test_activation_checkpointing_leaves_gradients_alone() -> None:
    model = small(position="rope")
    idx = torch.randint(50, (2, 8))
    model(idx, idx).loss_sum.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.activation_checkpointing = True
    model(idx, idx).loss_sum.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_position_tables_stay_exact_under_bf16_and_survive_the_meta_device() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=8, block_size=1024, position="rope"))
    model = model.to_empty(device="cpu").bfloat16()
    assert model.rope is not None
    angles = model.rope(torch.tensor([1001]))
    assert angles.dtype == torch.float32
    assert angles[0, 0, 0].item() == pytest.approx(torch.tensor(1001.0, dtype=torch.float64).cos().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 100, "n_head": 12}, "n_embd=100 is not divisible by n_head=12: choose n_embd=96"),
        ({"n_head": 12, "n_kv_head": 5}, "n_head=12 is not divisible by n_kv_head=5"),
        ({"n_layer": 0}, "n_layer=0 must be"),
        ({"mlp": "gelu_tan"}, 'did you mean "gelu_tanh"'),
        ({"vocab_size": 50, "padded_vocab_size": 49}, "below vocab_size"),
        ({"dropout": 1.5}, r"dropout=1.5"),
        ({"attn_dropout": 1.0}, r"attn_dropout=1.0 is not a probability below 1"),
        ({"position": "rope", "head_dim": 5}, "odd"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks high_freq_factor"),
        ({"block_norm": "sandwich"}, "block_norm='sandwich' is unknown"),
        ({"sliding_window": 0}, "sliding_window=0 must be a whole number of at least 1"),
        ({"global_layers": [1]}, "global_layers=.1. has no effect with sliding_window=None: set sliding_window"),
        ({"sliding_window": 8, "global_layers": [12]}, "has the layer 12, but n_layer=12: choose from 0 to 11"),
        ({"sliding_window": 8, "global_layers": [1, 1]}, "twice"),
        ({"sliding_window": 8, "global_layers": "1"}, "must be a list of layers"),
        ({"sliding_window": 8, "global_layers": [True]}, "must be a list of layers"),
        ({"rotary_dim": 16}, "rotary_dim=16 has no effect with position=learned: choose another position"),
        ({"position": "rope", "rotary_dim": 15}, "rotary_dim=15 is odd"),
        ({"position": "rope", "rotary_dim": 66}, "rotary_dim=66 is more than head_dim=64"),
        ({"position": "rope", "rope_local_theta": 5.0}, "no effect with sliding_window=None"),
        ({"sliding_window": 8, "rope_local_theta": 5.0}, "no effect with position=learned"),
        ({"position": "rope", "sliding_window": 8, "rope_local_theta": -1.0}, "rope_local_theta=-1.0 must be positive"),
        ({"norm_unit_offset": True}, "norm_unit_offset=True has no effect with norm=layernorm: choose another norm"),
        ({"qk_norm_full": True}, "qk_norm_full=True has no effect with qk_norm=False: set qk_norm as well"),
        ({"attn_scale": 0}, "attn_scale=0 must be positive"),
        ({"attn_scale": "x"}, "attn_scale='x' must be a number"),
        ({"parallel_residual": 1}, "parallel_residual=1 must be true or false"),
    ],
)
def test_impossible_shapes_are_refused_with_the_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(**values)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match='did you mean "gpt2-xl"'):
        GPTConfig.from_preset("gpt2-xxl")
    with pytest.raises(UserError, match='did you mean "n_embd"'):
        GPTConfig.from_preset("gpt2", n_emb=3)


def test_flops_agree_with_pytorchs_counter() -> None:
    model = small(n_kv_head=2, position="rope").float()
    # The counter knows the products inside the math backend, but not the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(50, (2, 32)))
    assert counter.get_total_flops() == pytest.approx(64 * model.config.forward_flops_per_token(32), rel=1e-9)
