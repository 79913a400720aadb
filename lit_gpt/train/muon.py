"""Muon: momentum orthogonalised by a Newton-Schulz iteration, of many matrices at once, in the machine's arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

_MAX_ELEMENTS = 2**23
"""Of the matrices that are orthogonalised at once, unless a single one has more: 32 MiB in fp32."""

_TINY = 1e-10
"""Lower bound of what is divided by."""

Coefficients = tuple[float, float, float]


class BatchedMuon(Muon):
    """PyTorch's Muon, with its groups and its state, whose matrices are orthogonalised together.

    PyTorch's takes them one by one and in bf16, which a CPU without bf16 units emulates. Sharded parameters (FSDP2) are
    gathered for the orthogonalisation, a few at a time, and each rank keeps its share of the result.

    With a `beta2` it is NorMuon (arXiv 2510.05491): each row of an orthogonalised update (column, where there are more
    of those) is divided by the root of its mean square so far, and the whole brought back to the norm that it had.

    Attributes:
        arithmetic: dtype of the products: float32, or bfloat16, which rounds the update by about a hundredth.
        beta2: decay of the mean squares; 0 for Muon as it is, without them.
        found_inf: set by who steps it, as a fused AdamW has it: above 0, () float, the next step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        arithmetic: torch.dtype = torch.float32,
        beta2: float = 0.0,
    ) -> None:
        super().__init__(groups, momentum=momentum)
        self.arithmetic = arithmetic
        self.beta2 = beta2

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` runs before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                self._make_state(parameter)
            if skip is not None and skip.device.type == "cpu":  # where the answer is there without waiting
                if skip:
                    continue
                skip = None
            for together in _together(parameters):
                self._step(together, group, skip)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        momenta = [self._momentum(parameter, group, skip) for parameter in parameters]
        whole = [momentum.full_tensor() if hasattr(momentum, "full_tensor") else momentum for momentum in momenta]
        updates = newton_schulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"], self.arithmetic)
        del whole
        for parameter, momentum, update in zip(parameters, momenta, updates):
            if self.beta2:
                update = self._normalized(update, self.state[parameter]["mean_square"], skip)
            weight, (rows, columns) = _local(parameter), parameter.shape
            moved = weight * (1 - group["lr"] * group["weight_decay"])
            moved.add_(_share_of(update, momentum), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))
            _write(weight, moved, skip)

    def _make_state(self, parameter: Tensor) -> None:
        if "momentum_buffer" not in self.state[parameter]:
            zeros = torch.zeros_like(parameter.grad, memory_format=torch.preserve_format)  # type: ignore[arg-type]
            self.state[parameter]["momentum_buffer"] = zeros
        if self.beta2 and "mean_square" not in self.state[parameter]:  # whole on each rank: one number for each row
            rows, columns = parameter.shape
            size = (rows, 1) if rows >= columns else (1, columns)
            self.state[parameter]["mean_square"] = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)

    def _normalized(self, update: Tensor, mean_square: Tensor, skip: Tensor | None) -> Tensor:
        """The update, (rows, columns), with rows or columns of equal weight. Moves their mean squares."""
        update = update.float()
        along = 1 if update.size(0) >= update.size(1) else 0
        moved = mean_square.float().lerp(update.square().mean(along, keepdim=True), 1 - self.beta2)
        _write(mean_square, moved, skip)
        scaled = update / moved.sqrt().clamp(min=_TINY)
        return scaled * (update.norm() / scaled.norm().clamp(min=_TINY))

    def _momentum(self, parameter: Tensor, group: dict[str, Any], skip: Tensor | None) -> Tensor:
        """The parameter's momentum, moved by its gradient; where Nesterov's is asked for, one step ahead of it."""
        gradient, buffer = parameter.grad, self.state[parameter]["momentum_buffer"]
        assert gradient is not None
        moved = buffer.lerp(gradient, 1 - group["momentum"])
        _write(_local(buffer), _local(moved), skip)
        return gradient.lerp(moved, group["momentum"]) if group["nesterov"] else moved


def _together(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters whose smaller sides are equal, as many as may be orthogonalised at once."""
    by_side: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_side[min(parameter.shape)].append(parameter)
    for same in by_side.values():
        part: list[Tensor] = []
        for parameter in same:
            if part and sum(each.numel() for each in part) + parameter.numel() > _MAX_ELEMENTS:
                yield part
                part = []
            part.append(parameter)
        yield part


def _write(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Put `value` into `target`, but not where `skip` holds: the host does not learn which it is."""
    target.copy_(value if skip is None else torch.where(skip, target, value))


def _local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _share_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's share of `whole`, which every rank has, if it is to be sharded as `like` is."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()  # type: ignore[attr-defined]


# Newton-Schulz -------------------------------------------------------------------------------------------------------


def newton_schulz(
    matrices: Sequence[Tensor],
    coefficients: Coefficients,
    steps: int,
    eps: float,
    arithmetic: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The matrices with their singular values brought near 1 by X ← (a + b·XXᵀ + c·(XXᵀ)²) X, as Muon has it.

    In float32 and float64 it is the small Gram matrix XXᵀ that is iterated, all matrices in one product, and X is taken
    along only half-way and at the end. That squares the condition number; with the Gram matrix made anew half-way the
    result in fp32 is within 1e-3 of float64's, which a test holds (restarting, in
    https://dao-lab.ai/blog/2026/gram-newton-schulz). bf16 has too few digits for it: there X itself is iterated.

    Args:
        matrices: each (rows, columns), with equal smaller sides; float64 ones are computed in float64.
        coefficients: a, b and c.
        steps: iterations, at least 1.
        eps: a matrix of a smaller Frobenius norm is not scaled up to 1.
        arithmetic: float32 or bfloat16.
    """
    if matrices[0].dtype == torch.float64:
        arithmetic = torch.float64
    converted = [matrix.to(arithmetic) for matrix in matrices]
    if arithmetic == torch.bfloat16:
        return _iterate_matrices(converted, coefficients, steps, eps)
    return _iterate_gram(converted, coefficients, steps, eps)


def _iterate_gram(matrices: list[Tensor], coefficients: Coefficients, steps: int, eps: float) -> list[Tensor]:
    """Half of the steps, then the other half, each on a Gram matrix made anew."""
    scaled = [matrix / matrix.norm().clamp(min=eps) for matrix in matrices]
    before = (steps + 1) // 2
    halfway = _apply_steps(scaled, coefficients, before)
    return _apply_steps(halfway, coefficients, steps - before) if before < steps else halfway


def _apply_steps(matrices: list[Tensor], coefficients: Coefficients, steps: int) -> list[Tensor]:
    """With P = a + bA + cA² of the Gram matrix A, X ← PX makes A ← PAP: all P can be applied to X at the end."""
    a, b, c = coefficients
    is_tall = [matrix.size(0) > matrix.size(1) for matrix in matrices]
    gram = torch.stack([x.mT @ x if tall else x @ x.mT for x, tall in zip(matrices, is_tall)])
    product: Tensor | None = None  # of all P so far
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step + 1 < steps:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return [x @ each if tall else each @ x for x, tall, each in zip(matrices, is_tall, product)]


def _iterate_matrices(matrices: list[Tensor], coefficients: Coefficients, steps: int, eps: float) -> list[Tensor]:
    """The iteration as it is written, equal shapes in one product."""
    a, b, c = coefficients
    wide = [matrix.mT if matrix.size(0) > matrix.size(1) else matrix for matrix in matrices]
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(wide):
        by_shape[matrix.shape].append(index)
    results = list(matrices)
    for indices in by_shape.values():
        x = torch.stack([wide[index] for index in indices])
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=eps).to(x.dtype)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        for index, each in zip(indices, x):
            results[index] = each.mT if wide[index] is not matrices[index] else each
    return results
