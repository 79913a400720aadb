"""Optimizers: AdamW and Muon, which parameter each of them updates, and gradient clipping by norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_gpt.errors import UserError, nearest
from lit_gpt.train.muon import BatchedMuon

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move. The defaults are GPT-2 124M's in the common reproduction.

    Attributes:
        name: `adamw`, or `muon`: Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases.
        lr: peak learning rate of AdamW.
        weight_decay: decoupled decay of matrices under AdamW; norms and biases never decay.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        eps: AdamW's addition to the denominator.
        muon_lr: peak learning rate of Muon; an update's spectral norm is about muon_lr · √max(1, rows / columns).
        muon_momentum: Muon's momentum (Nesterov).
        muon_weight_decay: decoupled decay of the matrices under Muon.
        muon_beta2: NorMuon's decay of the mean squares of an update's rows, which it evens out; 0 for plain Muon.
    """

    name: OptimizerName = "adamw"
    lr: float = 6e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    muon_beta2: float = 0.0

    def __post_init__(self) -> None:
        """Check every value. Raises UserError, naming it and the remedy."""
        if self.name not in get_args(OptimizerName):
            raise UserError(f'unknown optimizer name "{self.name}": {nearest(str(self.name), get_args(OptimizerName))}')
        for name in ("lr", "weight_decay", "muon_lr", "muon_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be a finite number of at least 0")
        for name in ("beta1", "beta2", "muon_momentum", "muon_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.eps <= 0:
            raise UserError(f"eps={self.eps} must be above 0")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters of `model`, each once, in groups named `muon`, `matrices` and `vectors`; empty groups left out.

    Muon takes what multiplies hidden states inside the blocks. Embeddings and the head, whose rows are looked up or
    compared one by one, stay with AdamW (as in the Muon reports, arXiv 2502.16982). Vectors (norms, biases) do not
    decay.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    inner = {name for name, parameter in named if config.name == "muon" and ".h." in f".{name}" and parameter.ndim == 2}
    groups = {
        "muon": [parameter for name, parameter in named if name in inner],
        "matrices": [parameter for name, parameter in named if name not in inner and parameter.ndim >= 2],
        "vectors": [parameter for _, parameter in named if parameter.ndim < 2],
    }
    decay = {"muon": config.muon_weight_decay, "matrices": config.weight_decay, "vectors": 0.0}
    rate = {"muon": config.muon_lr, "matrices": config.lr, "vectors": config.lr}
    return [
        {"params": parameters, "name": name, "lr": rate[name], "weight_decay": decay[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, fused: bool = True, muon_arithmetic: torch.dtype = torch.float32
) -> Optimizer:
    """The optimizer of `config` over `model`'s parameters.

    Args:
        model: its parameters are on their final device.
        config: kind and rates.
        fused: AdamW in one kernel, on CPU and GPU. Leave it off under a gradient scaler, which a fused step would
            bypass before clipping.
        muon_arithmetic: of Muon's products: `lit_gpt.train.precision.muon_arithmetic` knows the machine's.
    """
    groups = parameter_groups(model, config)
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return AdamW(groups, betas=betas, eps=config.eps, fused=fused)
    muon = [group for group in groups if group["name"] == "muon"]
    rest = [group for group in groups if group["name"] != "muon"]
    parts: list[Optimizer] = [BatchedMuon(muon, config.muon_momentum, muon_arithmetic, config.muon_beta2)]
    if rest:  # an adapter may be nothing but matrices of the blocks
        parts.append(AdamW(rest, betas=betas, eps=config.eps, fused=fused))
    return CompositeOptimizer(*parts)


class CompositeOptimizer(Optimizer):
    """Several optimizers over disjoint groups as one: Lightning steps, clips, accumulates and saves them together.

    State and groups live here; each part works on its own share of them.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        sizes = [len(part.param_groups) for part in parts]
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self._share()

    def _share(self) -> None:
        """Give every part its groups and the common state; loading a state dict replaces both."""
        for part, start, end in zip(self.parts, [0, *self._ends], self._ends):
            part.param_groups = self.param_groups[start:end]
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part; `closure` runs once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        found_inf = getattr(self, "found_inf", None)
        for part in self.parts:
            part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()
        return loss


def skip_step_where(condition: Tensor, optimizer: Optimizer) -> None:
    """Have the next step of `optimizer` change nothing, its state included, where `condition` holds.

    The host does not learn which it is: nothing waits for the device. A fused AdamW looks at the attribute `found_inf`,
    which a gradient scaler would set, and so does our Muon; this is for runs without one.

    Args:
        condition: () bool, on the parameters' device.
        optimizer: from `make_optimizer`, fused.
    """
    optimizer.found_inf = condition.float()  # type: ignore[attr-defined]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients so that their total 2-norm is at most `max_norm` (None: leave them); the norm before, a scalar.

    Works on fp32 master gradients of every strategy, FSDP2's sharded ones included, and does not synchronise a GPU.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.clip_grad_norm_(with_gradient, math.inf if max_norm is None else max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every element is a finite number, () bool on their device; on all ranks the same for sharded ones."""
    largest = nn.utils.get_total_norm([tensor.detach() for tensor in tensors], math.inf)  # no sum that could overflow
    return (largest.full_tensor() if hasattr(largest, "full_tensor") else largest).isfinite()
