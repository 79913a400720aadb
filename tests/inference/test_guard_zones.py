"""The kernels against PyTorch in float64, with guard bytes around all memory that they are given.

The bytes are 0xFF, in fp32 and bf16 not a number: what reads them gives results that are none. Run as a program
(`python test_guard_zones.py 4`) it makes the scratch too small by so many bytes, which must be noticed.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fork_server import ForkServer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt.inference.decode_kernel import FusedDecode
from lit_gpt.inference.kernel_linear import KernelBf16Linear, KernelInt4Linear, KernelInt8Linear, KernelLinear
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache

GUARD = 4096 + 8
"""Bytes on each side; so that tensors are not aligned to what a vector register holds."""


class Guards:
    """Memory between guard bytes, and the kernels' calls with all their arguments in such memory."""

    def __init__(self, missing: int = 0) -> None:
        self._zones: list[tuple[str, Tensor]] = []
        self._missing = missing  # bytes by which scratch is too small
        self._scratch_bytes = 0

    def empty(self, n_bytes: int, name: str) -> Tensor:
        whole = torch.full((n_bytes + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        self._zones += [(f"before {name}", whole[:GUARD]), (f"after {name}", whole[GUARD + n_bytes :])]
        return whole[GUARD : GUARD + n_bytes]

    def copy(self, tensor: Tensor, name: str) -> Tensor:
        guarded = self.empty(tensor.nbytes, name).view(tensor.dtype).view(tensor.shape)
        return guarded.copy_(tensor)

    def read(self, address: int, n_bytes: int, name: str) -> Tensor:
        guarded = self.empty(n_bytes, name)
        ctypes.memmove(guarded.data_ptr(), address, n_bytes)
        return guarded

    def check(self) -> None:
        for name, zone in self._zones:
            assert bool((zone == 0xFF).all()), f"a guard byte {name} was overwritten"

    def _size(self, function: object, *arguments: object) -> int:
        self._scratch_bytes = function(*arguments)  # type: ignore[operator]
        return self._scratch_bytes

    def guard_linear(self, layer: KernelLinear) -> None:
        """The layer's weights, and those of its calls' arguments that are tensors."""
        for field, name in (("weight", "weight"), ("scale", "scale"), ("offset", "_offset"), ("bias", "bias")):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                setattr(layer, name, self.copy(tensor, name))
                setattr(layer.layout, field, getattr(layer, name).data_ptr())
        real, size = layer._forward, layer._scratch_bytes

        def forward(layout: object, x: int, y: int, scratch: int | None, n_rows: int, threads: int) -> None:
            inputs = self.read(x, 4 * n_rows * layer.layout.I, "x")
            outputs = self.empty(4 * n_rows * layer.layout.O, "y")
            before, addresses = inputs.clone(), (inputs.data_ptr(), outputs.data_ptr())
            space = None if scratch is None else self.empty(self._scratch_bytes - self._missing, "scratch").data_ptr()
            real(layout, *addresses, space, n_rows, threads)
            assert torch.equal(inputs, before), "the input was overwritten"
            ctypes.memmove(y, outputs.data_ptr(), outputs.nbytes)

        layer._forward = forward
        layer._scratch_bytes = lambda *arguments: self._size(size, *arguments)

    def guard_decode(self, kernel: FusedDecode) -> None:
        real, size = kernel._decode, kernel._scratch_bytes
        kernel._stack = None  # the linear layers have been moved

        def decode(
            stack: object, cache: object, x: int, slots: int, lengths: int, _: int, n: int, n_new: int, threads: int
        ) -> None:
            inputs = self.read(x, 4 * n * n_new * kernel._config.n_embd, "x")
            lists = [self.read(address, 8 * n, "slots and lengths") for address in (slots, lengths)]
            space = self.empty(self._scratch_bytes - self._missing, "scratch")
            addresses = [tensor.data_ptr() for tensor in (inputs, *lists, space)]
            real(stack, cache, *addresses, n, n_new, threads)
            ctypes.memmove(x, inputs.data_ptr(), inputs.nbytes)

        kernel._decode = decode
        kernel._scratch_bytes = lambda *arguments: self._size(size, *arguments)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


KINDS = {"fp32": KernelLinear, "bf16": KernelBf16Linear, "int8": KernelInt8Linear, "int4": KernelInt4Linear}
TOLERANCE = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.03, "int4": 0.3}


def check_linear(n_row: int, n_in: int, n_out: int, kind: str, bias: bool, seed: int, missing: int = 0) -> None:
    torch.manual_seed(seed)
    if kind == "int4":
        n_in = (n_in + 31) // 32 * 32
    plain, guards = nn.Linear(n_in, n_out, bias=bias), Guards(missing)
    layer = KINDS[kind](plain)
    guards.guard_linear(layer)
    x = torch.randn(n_row, n_in)
    got = layer(x).double()
    guards.check()
    expected = plain.double()(x.double())
    tolerance = TOLERANCE[kind] * x.norm(dim=1, keepdim=True) * plain.weight.norm(dim=1) + 1e-5
    assert bool(((got - expected).abs() <= tolerance).all())


class RoundingLinear(nn.Module):
    """A kernel's linear layer, which `check_linear` holds against float64, among layers in float64."""

    def __init__(self, layer: KernelLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.float()).double()


def round_like(reference: GPT, model: GPT) -> None:
    """Let the float64 `reference` round weights and inputs of its linear layers as `model` does.

    What else is computed differs then, by fp32's rounding alone. A norm of queries and keys makes what is rounded as
    large as one likes: of a key that is nearly zero it leaves a direction.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, KernelLinear):
            reference.set_submodule(name, RoundingLinear(layer))


def check_decode(
    config: GPTConfig, precision: str, lengths: list[int], seed: int, missing: int = 0, n_new: int = 1
) -> None:
    """One step of slots in reverse order, over a cache in which all that must not be read is not a number."""
    torch.manual_seed(seed)
    guards, plain, n = Guards(missing), GPT(config).eval(), len(lengths)
    for name, parameter in plain.named_parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
        parameter.data = guards.copy(parameter.data, name)
    reference = copy.deepcopy(plain).double()
    model = prepare_for_inference(plain, precision)
    assert isinstance(model.decode_kernel, FusedDecode)
    round_like(reference, model)
    for layer in [layer for layer in model.modules() if isinstance(layer, KernelLinear)]:
        guards.guard_linear(layer)
    guards.guard_decode(model.decode_kernel)
    cache = KVCache(config, n + 1, max(lengths) + n_new, model.cache_dtype)
    exact = KVCache(config, n + 1, max(lengths) + n_new, torch.float64)
    slots = list(range(n))[::-1]
    for store, copied in ((cache.k, exact.k), (cache.v, exact.v)):
        store.fill_(torch.nan)
        for slot, length in zip(slots, lengths):
            store[:, slot, :, :length].normal_()
            copied[:, slot, :, :length] = store[:, slot, :, :length]
    cache.k, cache.v = guards.copy(cache.k, "keys"), guards.copy(cache.v, "values")
    for each in (cache, exact):
        each.lengths = [lengths[slots.index(slot)] for slot in range(n)] + [0]
    before = cache.k.clone()
    idx = torch.randint(config.vocab_size, (n, n_new))
    got = model(idx, cache=cache.step(slots, n_new)).logits
    wanted = reference(idx, cache=exact.step(slots, n_new)).logits
    guards.check()
    assert (got - wanted).norm() <= (1e-5 if precision == "fp32" else 0.1) * wanted.norm()  # of a cache in bf16
    for slot, length in zip(slots, lengths):
        new = slice(length, length + n_new)
        before[:, slot, :, new] = cache.k[:, slot, :, new]
        got, wanted = cache.k[0, slot, :, new].double(), exact.k[0, slot, :, new]
        assert (got - wanted).norm() <= 0.02 * max(wanted.norm(), wanted.numel() ** 0.5)  # a random key may be tiny
    assert torch.equal(before.nan_to_num(7), cache.k.nan_to_num(7)), "more of the cache was written than the new keys"


LINEAR = (
    st.integers(1, 70),
    st.integers(1, 150),
    st.integers(1, 40),
    st.sampled_from(sorted(KINDS)),
    st.booleans(),
    st.integers(0, 2**31),
)
"""Arguments of `check_linear`."""


@pytest.mark.slow
@pytest.mark.kernels
@settings(max_examples=30, deadline=None)
@given(*LINEAR)
def test_a_linear_layer_stays_within_its_memory(
    level: str, n_row: int, n_in: int, n_out: int, kind: str, bias: bool, seed: int
) -> None:
    check_linear(n_row, n_in, n_out, kind, bias, seed)


SHAPES = st.fixed_dictionaries({
    "n_head": st.sampled_from([2, 4, 6]),
    "n_kv_head": st.sampled_from([1, 2]),
    "n_embd": st.integers(1, 12).map(lambda n: 12 * n),
    "head_dim": st.sampled_from([None, 2, 6, 18, 66]),
    "intermediate_size": st.integers(1, 100),
    "mlp": st.sampled_from(["gelu", "gelu_tanh", "relu", "relu2", "swiglu"]),
    "norm": st.sampled_from(["layernorm", "rmsnorm"]),
    "qk_norm": st.booleans(),
    "qkv_bias": st.booleans(),
})  # fmt: skip


STEP = (
    SHAPES,
    st.booleans(),
    st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    st.lists(st.integers(0, 70), min_size=1, max_size=6),
    st.sampled_from([1, 1, 2, 7, 10]),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
"""Arguments of `check_step`."""


def check_step(
    shape: dict[str, object],
    rotary: bool,
    precision: str,
    lengths: list[int],
    n_new: int,
    n_threads: int,
    seed: int,
) -> None:
    """`check_decode` for a model of that shape, rotary where its heads allow it."""
    width = shape["head_dim"] or shape["n_embd"] // shape["n_head"]  # type: ignore[operator]
    position = "rope" if rotary and width % 2 == 0 else "learned"
    config = GPTConfig(vocab_size=50, block_size=80, n_layer=2, position=position, **shape)  # type: ignore[arg-type]
    with threads(n_threads):
        check_decode(config, precision, lengths, seed, n_new=n_new)


@pytest.mark.slow
@pytest.mark.kernels
@settings(max_examples=15, deadline=None)
@given(st.tuples(*STEP))
@torch.inference_mode()
def test_the_fused_step_stays_within_its_memory(level: str, step: tuple[Any, ...]) -> None:
    check_step(*step)


SMALL = GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=2, n_embd=32)
EXACT: dict[str, Callable[[int], None]] = {  # here the scratch is used to its last byte
    "linear int8": lambda missing: check_linear(3, 64, 8, "int8", True, 0, missing),
    "linear int4": lambda missing: check_linear(3, 64, 8, "int4", True, 0, missing),
    "decode fp32": lambda missing: check_decode(SMALL, "fp32", [8], 0, missing),
    "decode int8": lambda missing: check_decode(SMALL, "int8", [8, 3], 0, missing),
    "decode of ten tokens": lambda missing: check_decode(SMALL, "int8", [8, 3], 0, missing, n_new=10),
}


@pytest.mark.slow
@pytest.mark.kernels
@torch.inference_mode()
def test_scratch_that_is_too_small_by_four_bytes_is_noticed(fork_server: ForkServer) -> None:
    """In a process of its own: memory is overwritten there."""
    for check in EXACT.values():
        check(0)
    run = fork_server.run(__file__, 4)
    noticed = [f"{name}: a guard byte after scratch was overwritten" for name in EXACT]
    assert run.stdout.splitlines() == noticed, run.stderr


@pytest.mark.slow
@pytest.mark.kernels
@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit_of_the_kernels(level: str) -> None:
    torch.manual_seed(0)
    swiglu = {"mlp": "swiglu", "norm": "rmsnorm"}
    for shape, precision in (({}, "fp32"), (swiglu, "int8"), (swiglu, "int4"), ({"mlp": "relu2"}, "bf16")):
        config = GPTConfig(vocab_size=500, block_size=32, n_layer=2, n_head=12, n_kv_head=1, n_embd=132, **shape)
        model = prepare_for_inference(GPT(config), precision)
        cache = KVCache(config, 5, 32, model.cache_dtype)
        cache.k.normal_()
        cache.v.normal_()
        cache.lengths = [20, 3, 20, 0, 31]
        idx, x, results = torch.randint(500, (5, 1)), torch.randn(5, 16, 132), []
        many = torch.randint(500, (2, 11))
        for n_threads in (1, 2, 3, 8):
            with threads(n_threads):
                step, steps = cache.step(range(5), 1), cache.step([0, 2], 11)
                results.append((model(idx, cache=step).logits, model(many, cache=steps).logits, model.lm_head(x)))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


if __name__ == "__main__":
    with torch.inference_mode():
        for kernel, check in EXACT.items():
            try:
                check(int(sys.argv[1]))
            except AssertionError as error:
                print(f"{kernel}: {error}", flush=True)
