"""Muon's Newton-Schulz iteration against float64, and the optimizer against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt.train import muon
from lit_gpt.train.muon import BatchedMuon, newton_schulz

COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7


def reference(matrix: Tensor) -> Tensor:
    """The iteration as it is published, on the matrix itself, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix.double()
    x = x.mT if matrix.size(0) > matrix.size(1) else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.size(0) > matrix.size(1) else x


def error(found: Tensor, matrix: Tensor) -> float:
    """Relative to the reference, by the Frobenius norm; 0 where both are 0."""
    wanted = reference(matrix)
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def matrix_of(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    """A gradient of that kind, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64))[0]
    values = {
        "random": torch.rand(side, generator=generator, dtype=torch.float64),
        "rank 1": torch.eye(1, side, dtype=torch.float64)[0],
        "half rank": (torch.arange(side) < (side + 1) // 2).double(),
        "decaying": torch.logspace(0, -12, side, dtype=torch.float64),
        "orthogonal": torch.ones(side, dtype=torch.float64),
        "two sizes": torch.where(torch.arange(side) % 2 == 0, 1.0, 3e-4).double(),
        "zero": torch.zeros(side, dtype=torch.float64),
    }[kind]
    return (left * values @ right.mT).float()


KINDS = ("random", "rank 1", "half rank", "decaying", "orthogonal", "two sizes", "zero")


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(1, 5), st.booleans(), st.integers(-9, 6)), min_size=1, max_size=4
    ),
    st.integers(1, 48),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_fp32_is_within_a_thousandth_of_float64(asked: list[tuple[str, int, bool, int]], side: int, seed: int) -> None:
    """Also of gradients without full rank, whose Gram matrix has no digits left for the small singular values."""
    matrices = []
    for kind, times, is_tall, exponent in asked:
        rows, columns = (side * times, side) if is_tall else (side, side * times)
        matrices.append(matrix_of(kind, rows, columns, seed) * 10.0**exponent)
    for found, matrix in zip(newton_schulz(matrices, COEFFICIENTS, STEPS, EPS), matrices):
        assert found.shape == matrix.shape
        assert error(found, matrix) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(256, 768), (1024, 256)])
def test_fp32_is_within_a_thousandth_of_float64_at_the_quickstarts_size(kind: str, shape: tuple[int, int]) -> None:
    matrix = matrix_of(kind, *shape, seed=1)
    (found,) = newton_schulz([matrix], COEFFICIENTS, STEPS, EPS)
    assert error(found, matrix) < 2e-4  # 3e-4 and more, of rank 1, without a new Gram matrix half-way


def test_float64_is_computed_in_float64_and_bf16_where_it_is_asked_for() -> None:
    matrix = matrix_of("random", 32, 96, seed=2)
    (exact,) = newton_schulz([matrix.double()], COEFFICIENTS, STEPS, EPS)
    assert exact.dtype == torch.float64
    assert error(exact, matrix) < 1e-9
    coarse, tall = newton_schulz([matrix, matrix.mT], COEFFICIENTS, STEPS, EPS, torch.bfloat16)
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(coarse, tall.mT)
    assert 1e-3 < error(coarse, matrix) < 0.05


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 24), (8, 8), (32, 8), (8, 24), (16, 16)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def make(weights: list[nn.Parameter], beta2: float = 0.0) -> BatchedMuon:
    return BatchedMuon([{"params": weights, "lr": 0.05, "weight_decay": 0.1}], momentum=0.9, beta2=beta2)


def test_the_step_is_torchs_but_for_bf16s_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's optimizer with the exact iteration put into it."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda grad, *_: reference(grad).float())
    ours, theirs = parameters(), parameters()
    optimizer, torchs = make(ours), torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.9)
    for step in range(5):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        optimizer.step()
        torchs.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_state_that_torchs_muon_saved_is_gone_on_with() -> None:
    weights = parameters()
    torchs = torch.optim.Muon(weights, lr=0.05, weight_decay=0.1, momentum=0.9)
    give_gradients(weights, 1)
    torchs.step()
    optimizer = make(weights)
    optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]
    for weight in weights:
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], torchs.state[weight]["momentum_buffer"])


def test_normuon_divides_each_neuron_by_its_root_mean_square_and_keeps_the_norm() -> None:
    """Row by row in float64, as the paper has it; the norm is that of Muon's own step."""
    even, plain = parameters(), parameters()
    optimizer, muon_itself = make(even, beta2=0.8), make(plain)
    squares: list[list[float]] = [[0.0] * max(weight.shape) for weight in even]
    for step in range(4):
        before = [weight.detach().clone() for weight in even]
        for weight, other in zip(even, plain):
            other.data.copy_(weight.data)
        for weights in (even, plain):
            give_gradients(weights, step)
        optimizer.step()
        muon_itself.step()
        for weight, other, start, mean_squares in zip(even, plain, before, squares):
            kept = start.double() * (1 - 0.05 * 0.1)
            moved, update = (each.detach().double() - kept for each in (weight, other))
            scale = 0.05 * math.sqrt(max(1, weight.size(0) / weight.size(1)))
            neurons = list(update if weight.size(0) >= weight.size(1) else update.T)
            for index, neuron in enumerate(neurons):
                mean = float((neuron / scale).square().mean())
                mean_squares[index] = 0.8 * mean_squares[index] + 0.2 * mean
                neurons[index] = neuron / math.sqrt(mean_squares[index])
            wanted = torch.stack(neurons, 0 if weight.size(0) >= weight.size(1) else 1)
            wanted = wanted * update.norm() / wanted.norm()
            torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-6)
            assert not torch.allclose(moved, update, rtol=1e-2)


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_a_reload_changes_no_bit(beta2: float) -> None:
    straight, reloaded = parameters(), parameters()
    one, other = make(straight, beta2), make(reloaded, beta2)
    for step in range(6):
        if step == 3:
            state = other.state_dict()
            other = make(reloaded, beta2)
            other.load_state_dict(state)
        for weights in (straight, reloaded):
            give_gradients(weights, step)
        one.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, reloaded))


@pytest.mark.parametrize("skip", [None, False, True])
def test_a_device_that_is_not_asked_skips_a_step_all_the_same(skip: bool | None) -> None:
    """What a GPU runs: the condition stays a tensor."""
    weights, plain = parameters(), parameters()
    optimizer, other = make(weights, beta2=0.9), make(plain, beta2=0.9)
    for step in range(2):
        give_gradients(weights, step)
        give_gradients(plain, step)
        optimizer.step()
        if step == 0:
            other.step()
    for weight in weights:
        assert weight.grad is not None
        weight.grad[0, 0] = math.inf if skip else 1.0
    before = [weight.detach().clone() for weight in weights]
    states = [(state, state.clone()) for weight in weights for state in optimizer.state[weight].values()]
    condition = None if skip is None else torch.tensor(skip)
    with torch.no_grad():
        for together in muon._together(optimizer.param_groups[0]["params"]):
            optimizer._step(together, optimizer.param_groups[0], condition)
    same = [torch.equal(a, b) for a, b in zip(weights, before)]
    same += [torch.equal(state, b) for state, b in states]
    assert all(same) if skip else not any(same)
    assert all(weight.isfinite().all() for weight in weights)


def test_matrices_are_taken_together_by_their_smaller_side_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_MAX_ELEMENTS", 8 * 40)
    weights: list[Tensor] = list(parameters())
    parts = [[tuple(weight.shape) for weight in part] for part in muon._together(weights)]
    assert parts == [[(8, 24), (8, 8)], [(32, 8)], [(8, 24)], [(16, 16)]]
    assert list(muon._together([])) == []
