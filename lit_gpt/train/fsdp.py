"""FSDP2: a model sharded over several devices, block by block."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT


def shard(model: GPT, mesh: DeviceMesh, precision: str, compile_blocks: bool) -> None:
    """Shard `model` in place over the mesh's data-parallel axis: each block on its own, the rest together.

    Args:
        model: on the CPU, with the same weights on every rank.
        mesh: Lightning's, with the axes `data_parallel` and `tensor_parallel`.
        precision: the Trainer's. Under `bf16-mixed` weights are gathered in bf16, half the traffic of fp32; gradients
            are summed in fp32.
        compile_blocks: `torch.compile` each block; the gathering between them stays outside.

    Raises:
        UserError: when the mesh asks for tensor parallelism, which this model does not have.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported: set the strategy's "
            f"data_parallel_size={mesh.size()} and tensor_parallel_size=1"
        )
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    axis = mesh["data_parallel"]
    for block in model.h:
        if compile_blocks:
            block.compile()
        fully_shard(block, mesh=axis, mp_policy=policy)
    fully_shard(model, mesh=axis, mp_policy=policy)
