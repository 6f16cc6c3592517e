"""The GPU backend of the scan, backward: launches ``native/cuda/backward.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from mambamic.kernels import nvrtc
from mambamic.kernels.cuda import DTYPES, REGISTERS, check, prepare


def backward(
    grad_y: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, projections, dt_weight, dt_bias, A and skip.

    Each comes in the dtype of what it belongs to. Sums over images and blocks are taken in a
    fixed order: the result is deterministic.
    """
    sizes = check(x, projections, dt_weight, A)
    x, projections = x.contiguous(), projections.contiguous()
    grad_y = grad_y.to(x.dtype).contiguous()
    weights = prepare(dt_weight, dt_bias, A, skip)
    # As many channels in a block as its 48 KiB of shared memory take, spread evenly.
    blocks = -(-sizes.d_inner // (64 if sizes.rank <= 8 else 32))
    channels = -(-sizes.d_inner // (8 * blocks)) * 8
    grad_x = torch.empty_like(x)
    partial = grad_x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    grad_projections = projections.new_empty(
        (blocks, *projections.shape), dtype=torch.float32 if blocks > 1 else projections.dtype
    )
    grads = [x.new_empty((sizes.batch, *w.shape), dtype=torch.float32) for w in weights]
    macros = {
        "DTYPE": DTYPES[x.dtype],
        "D_STATE": sizes.d_state,
        "DT_RANK": sizes.rank,
        "CHANNELS": channels,
        "REGISTERS": REGISTERS,
        "SPLIT": int(blocks > 1),
    }
    if x.numel():
        nvrtc.launch(
            ("common.cuh", "backward.cu"),
            "scan_backward",
            macros,
            (sizes.batch, blocks),
            channels * 4,
            *(grad_y, x, projections, *weights, states, grad_x, partial, grad_projections, *grads),
            *sizes.image,
        )
    summed = grad_projections[0] if blocks == 1 else grad_projections.sum(0).to(projections.dtype)
    parameters = (dt_weight, dt_bias, A, skip)
    of_weight, of_bias, of_A, of_skip = (
        grad.sum(0).to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)
    )
    return grad_x, summed, of_weight, of_bias, of_A, of_skip
