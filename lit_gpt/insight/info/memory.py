"""Memory of a training step, estimated from a `GPTConfig` alone.

Every figure is in bytes. Activations are what autograd keeps between the forward and the backward pass of one
micro-batch, tensor by tensor as PyTorch's eager CPU kernels save them; the tests compare the sums with what autograd
really saved. `torch.compile` keeps less, CUDA's fused RMSNorm as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import get_args

from lit_gpt.errors import UserError, nearest
from lit_gpt.model.attention import SHORT_CONTEXT
from lit_gpt.model.config import GATED, GPTConfig
from lit_gpt.model.loss import BLOCK, CHUNK_BYTES
from lit_gpt.train.optim import OptimizerName
from lit_gpt.train.precision import TrainerPrecision


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training step.

    Attributes:
        weights: the parameters.
        gradients: as large as the parameters.
        optimizer: its moments: two per weight for AdamW, one for the matrices that Muon updates.
        activations: kept from the forward pass for the backward pass of one micro-batch.
        weight_casts: copies of the matrices in the lower precision that autocast keeps until the backward pass.
        workspace: the largest short-lived tensors: logits of a chunk of the loss and the head's gradient, or those
            of the first block to go backward.
        peak: the most that is alive at once. Gradients grow while activations shrink, so it is below the sum.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    weight_casts: int
    workspace: int
    peak: int

    def to_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingStep:
    """What a training step is estimated for.

    Attributes:
        batch_size: sequences in a micro-batch.
        context: tokens in a sequence.
        precision: of the Trainer.
        optimizer: `adamw`, or `muon` with AdamW for what is no matrix of a block.
        accumulate_grad_batches: with more than one, gradients outlive the micro-batch.
        activation_checkpointing: keep each block's input only.
    """

    batch_size: int
    context: int
    precision: TrainerPrecision = "32-true"
    optimizer: OptimizerName = "adamw"
    accumulate_grad_batches: int = 1
    activation_checkpointing: bool = False

    def check(self, config: GPTConfig) -> None:
        """Raises UserError for a number below 1, an unknown name, or a context beyond the model's."""
        accumulate = self.accumulate_grad_batches
        numbers = {"batch_size": self.batch_size, "context": self.context, "accumulate_grad_batches": accumulate}
        for name, value in numbers.items():
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.context > config.block_size:
            raise UserError(
                f"context={self.context} is longer than the model's block_size={config.block_size}: lower it"
            )
        check_precision(self.precision)
        if self.optimizer not in get_args(OptimizerName):
            nearest_name = nearest(self.optimizer, get_args(OptimizerName))
            raise UserError(f'unknown optimizer "{self.optimizer}": {nearest_name}')


def training_memory(
    config: GPTConfig, parameters: int, matrices: int, step: TrainingStep, device: str = "cpu"
) -> TrainingMemory:
    """Bytes of a training step.

    Args:
        config: the model's shape.
        parameters: number of weights, shared ones counted once.
        matrices: those of them in the blocks' matrices, which Muon updates.
        step: what it is estimated for.
        device: `cpu`, whose bf16 attention keeps the scores of a short context, or another, whose does not.

    Raises:
        UserError: for a step that `TrainingStep.check` refuses.
    """
    step.check(config)
    size = _master_bytes(step.precision)
    weights = gradients = parameters * size
    moments = size * (2 * parameters - (matrices if step.optimizer == "muon" else 0))
    tokens = step.batch_size * step.context
    block = block_activation_bytes(config, step.batch_size, step.context, step.precision, device)
    kept = tokens * config.n_embd * size if step.activation_checkpointing else block
    activations = config.n_layer * kept + _outside_bytes(config, step.batch_size, step.context, step.precision)
    casts = _cast_bytes(config, step.precision, step.activation_checkpointing)
    workspace = _workspace_bytes(config, tokens, step.precision, block if step.activation_checkpointing else 0)
    held = gradients if step.accumulate_grad_batches > 1 else 0
    # Last of all comes the gradient of the embedding, which is added to the head's where they share a matrix.
    embedding = config.vocab_rows * config.n_embd * size if config.tie_embeddings else 0
    peak = weights + moments + max(activations + casts + held + workspace, gradients + embedding)
    return TrainingMemory(weights, gradients, moments, activations, casts, workspace, peak)


def check_precision(precision: str) -> TrainerPrecision:
    """The Trainer precision, if its memory is known. Raises UserError, naming those that are, if not."""
    for known in get_args(TrainerPrecision):
        if precision == known:
            return known
    raise UserError(
        f'the memory of precision "{precision}" is not known here: use {", ".join(get_args(TrainerPrecision))}'
    )


def _master_bytes(precision: TrainerPrecision) -> int:
    """Of one weight, and of one number in the residual stream."""
    return {"bf16-true": 2, "16-true": 2, "64-true": 8}.get(precision, 4)


def _compute_bytes(precision: TrainerPrecision) -> int:
    """Of one number that goes into a matrix product."""
    return 2 if precision.endswith("mixed") else _master_bytes(precision)


def block_activation_bytes(
    config: GPTConfig, batch_size: int, context: int, precision: TrainerPrecision = "32-true", device: str = "cpu"
) -> int:
    """What one block's forward pass on (batch_size, context) tokens keeps for its backward pass."""
    tokens, small = batch_size * context, _compute_bytes(precision)
    norms = (4 if config.block_norm == "both" else 2) * _norm_bytes(config, precision)
    copies = config.norm == "rmsnorm" and _master_bytes(precision) < 4  # in fp32, one for each norm
    if config.parallel_residual and not copies:
        norms -= _master_bytes(precision) * config.n_embd  # both branches begin with the same
    masks = 2 * config.n_embd * small if config.dropout else 0  # dropout of both branches
    per_token = norms + masks + _attention_bytes(config, context, precision, device) + _mlp_bytes(config, precision)
    angles = 2 * context * config.rotary_size * small if config.position == "rope" and small < 4 else 0
    return tokens * per_token + angles


def _norm_bytes(config: GPTConfig, precision: TrainerPrecision) -> int:
    """A norm over C, for one token: its input and statistics; RMSNorm keeps the normalised input too, in fp32."""
    if config.norm == "rmsnorm":
        return max(4, _master_bytes(precision)) * (2 * config.n_embd + 1)
    return _master_bytes(precision) * (config.n_embd + 2)


def _attention_bytes(config: GPTConfig, context: int, precision: TrainerPrecision, device: str) -> int:
    """Attention, for one token: what goes into both products, q, k, v, the output and a softmax statistic."""
    small, wide = _compute_bytes(precision), max(4, _master_bytes(precision))
    q, kv = config.n_head * config.head_size, config.kv_heads * config.head_size
    total = small * (config.n_embd + q)  # inputs of c_attn and c_proj
    apart = config.position == "rope" or config.qk_norm  # q and k are no longer slices of what c_attn returned
    drops = config.attention_dropout > 0
    tables = 3 if drops else 1  # of scores: with dropout also what is dropped, and the rest
    plain = device == "cpu" and "bf16" in precision and q == kv and context <= SHORT_CONTEXT
    if plain:  # two products: q, k, v and the scores
        total += small * (3 * q + tables * config.n_head * context)
    elif drops:  # no fused kernel: scaled q and k, v, and the scores
        total += wide * (3 * q + tables * config.n_head * context)
    else:
        total += small * (q + 2 * kv) + wide * config.n_head
        total += small * (q + kv + q) if apart else 0
    if config.qk_norm:
        copies = 2 if small < wide else 1  # the normalised one; and the fp32 copy that the norm makes of bf16
        total += wide * (copies * (q + kv) + config.n_head + config.kv_heads)
        total += small * (q + 2 * kv) if drops and not plain and copies == 1 else 0
    return total


def _mlp_bytes(config: GPTConfig, precision: TrainerPrecision) -> int:
    """The MLP, for one token: its input (autocast makes one copy for each matrix), the activation's, c_proj's."""
    gated = config.mlp in GATED
    wide = 4 if gated else 1 if config.mlp == "relu" else 2
    inputs = 2 if gated and precision.endswith("mixed") else 1
    return _compute_bytes(precision) * (inputs * config.n_embd + wide * config.mlp_size)


def _outside_bytes(config: GPTConfig, batch_size: int, context: int, precision: TrainerPrecision) -> int:
    """What is kept outside the blocks: token ids, dropout of the embedding, the last norm, the loss's gradient."""
    tokens, size = batch_size * context, _master_bytes(precision)
    per_token = 2 * 8 + _norm_bytes(config, precision) + _compute_bytes(precision) * config.n_embd
    per_token += size * config.n_embd if config.dropout else 0
    return tokens * per_token


def _cast_bytes(config: GPTConfig, precision: TrainerPrecision, activation_checkpointing: bool) -> int:
    """Autocast's copies of the blocks' matrices. Recomputed blocks make theirs anew, one block at a time."""
    if not precision.endswith("mixed"):
        return 0
    blocks = config.matmul_weights() - config.n_embd * config.vocab_rows
    return 2 * (blocks // config.n_layer if activation_checkpointing else blocks)


def _workspace_bytes(config: GPTConfig, tokens: int, precision: TrainerPrecision, recomputed: int) -> int:
    """The largest short-lived tensors, at one of two moments.

    In the loss: a chunk's logits with a few rows of them in fp32, the head's gradient, and its share from one chunk
    where that is not the whole. At the turn to the backward pass: the head's gradient twice, and the largest tensor
    inside a block, with the block's activations if they are `recomputed` (bytes) there.
    """
    size, small = _master_bytes(precision), _compute_bytes(precision)
    rows = min(tokens, max(1, CHUNK_BYTES // (small * config.vocab_rows)))
    weight = config.vocab_rows * config.n_embd
    cast = small * weight if small < size else 0
    tables = config.vocab_rows * rows * small + 3 * min(config.vocab_rows * rows, BLOCK) * max(4, size)
    share = weight * small if small < size or tokens > rows else 0
    loss = weight * size + cast + tables + share
    turn = 2 * weight * size + recomputed + tokens * config.mlp_size * small
    return max(loss, turn)
