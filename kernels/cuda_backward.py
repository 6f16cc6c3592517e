"""The GPU backend of the scan, backward: launches ``native/cuda/backward.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from mambamic.kernels import nvrtc
from mambamic.kernels.cuda import DTYPES, TILE, check, prepare

_N_DIRECTIONS = 4
_WARP_CHANNELS = 8
_MOST_CHANNELS = 64  # of a block: as many as its shared memory takes
# Per thread, for small blocks and for others: enough not to spill much, few enough for 12 to 16
# warps on a multiprocessor.
_SMALL_BLOCK, _SMALL_BLOCK_REGISTERS, _REGISTERS = 4, 168, 128
_COLUMNS = 8  # the rank is rounded up to what the tensor cores multiply at once


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

    Each comes in the dtype of what it belongs to. Sums over directions, images and blocks are
    taken in a fixed order: the result is deterministic.
    """
    sizes = check(x, projections, dt_weight, A)
    x, projections = x.contiguous(), projections.contiguous()
    grad_y = grad_y.to(x.dtype).contiguous()
    weights = prepare(dt_weight, dt_bias, A, skip)
    blocks = -(-sizes.d_inner // _MOST_CHANNELS)
    channels = -(-sizes.d_inner // (_WARP_CHANNELS * blocks)) * _WARP_CHANNELS
    images = sizes.batch * sizes.stack
    grad_x = x.new_empty((_N_DIRECTIONS, *x.shape))
    grad_projections = projections.new_empty(
        (blocks, *projections.shape), dtype=torch.float32 if blocks > 1 else projections.dtype
    )
    warps = channels // _WARP_CHANNELS
    grads = [x.new_empty((images, *w.shape), dtype=torch.float32) for w in weights]
    macros = {
        "DTYPE": DTYPES[x.dtype],
        "D_STATE": sizes.d_state,
        "DT_RANK": sizes.rank,
        "CHANNELS": channels,
        "REGISTERS": _SMALL_BLOCK_REGISTERS if warps <= _SMALL_BLOCK else _REGISTERS,
        "SPLIT": int(blocks > 1),
    }
    if x.numel():
        nvrtc.launch(
            ("common.cuh", "backward.cu"),
            "scan_backward",
            macros,
            (_N_DIRECTIONS * blocks * images,),
            warps * 32,
            *(grad_y, x, projections, *weights, states, grad_x, grad_projections, *grads),
            *(images, sizes.height, sizes.width, sizes.d_inner, sizes.stack),
            shared_bytes=_shared_bytes(warps, sizes.rank, sizes.d_state),
        )
    summed = grad_projections[0] if blocks == 1 else grad_projections.sum(0).to(projections.dtype)
    parameters = (dt_weight, dt_bias, A, skip)
    of_weight, of_bias, of_A, of_skip = (
        grad.sum(0).to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)
    )
    return grad_x.sum(0), summed, of_weight, of_bias, of_A, of_skip


def _shared_bytes(warps: int, rank: int, d_state: int) -> int:
    """Return what a block needs: rows of B, C and dt, and each warp's sums and ``Own``."""
    columns = -(-rank // _COLUMNS) * _COLUMNS
    rows = TILE * (2 * d_state + columns)
    sums = TILE * (4 * d_state + columns)
    own = (7 * TILE + columns) * _WARP_CHANNELS
    return 4 * (rows + warps * (sums + own))
