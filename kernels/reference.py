"""The 2-D selective scan in plain PyTorch: slow, differentiable, exact in float64.

Every other backend is held to this file. It follows the definition step by step and
materialises everything: four sequences, the low-rank steps lifted to all channels, and one
state per position. Nothing here is meant to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

N_DIRECTIONS = 4


def cross_scan(image: Tensor) -> Tensor:
    """Read an image along the four scan directions.

    Args:
        image: (B, H, W, K, C), the values that belong to direction k in ``[..., k, :]``.

    Returns:
        (B, K, L, C) with L = H * W: row by row, column by column, and both reversed.
    """
    rows = image.flatten(1, 2)  # [B, L, K, C]
    columns = image.transpose(1, 2).flatten(1, 2)
    return torch.stack(
        [rows[:, :, 0], columns[:, :, 1], rows[:, :, 2].flip(1), columns[:, :, 3].flip(1)], dim=1
    )


def cross_merge(sequences: Tensor, height: int, width: int) -> Tensor:
    """Put four scanned sequences back in image order and sum them.

    Args:
        sequences: (B, K, L, C) in scan order.
        height: H.
        width: W, with H * W = L.

    Returns:
        (B, H, W, C).
    """
    by_rows = sequences[:, 0] + sequences[:, 2].flip(1)
    by_columns = sequences[:, 1] + sequences[:, 3].flip(1)
    rows: Tensor = by_rows.unflatten(1, (height, width))
    columns: Tensor = by_columns.unflatten(1, (width, height))
    return rows + columns.transpose(1, 2)


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sums in another dtype; what float16 cannot hold becomes its largest, not infinity.

    It happens to a trained MedMamba with rare images, and infinity is no number after the norm that
    follows.
    """
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        y = y.clamp(-most, most)
    return y.to(dtype)


def selective_scan_2d(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, skip: Tensor
) -> Tensor:
    """Run the selective scan over an image in four directions and sum the results.

    Per direction, channel d and state n, with delta = softplus(dt_weight @ dt + dt_bias):
    ``s <- exp(delta * A) * s + delta * B * x`` and ``y = sum_n C * s + skip * x``.

    Args:
        x: (B, H, W, D), the image.
        projections: (B, H, W, K, R + 2 N), what the input projection gives at each position for
            each direction: the low-rank step dt (R), then B (N), then C (N).
        dt_weight: (K, D, R), lifts the low-rank step to all channels.
        dt_bias: (K, D).
        A: (K, D, N), negative.
        skip: (K, D).

    Returns:
        (B, H, W, D) in the dtype of ``x``, as ``narrowed`` has it. Float64 input is computed in
        float64, any other in float32.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_directions, d_inner, rank = dt_weight.shape
    d_state = A.shape[-1]
    _, height, width, _ = x.shape
    u = cross_scan(x.to(dtype).unsqueeze(3).expand(-1, -1, -1, n_directions, -1))  # [B, K, L, D]
    dt, b, c = cross_scan(projections.to(dtype)).split([rank, d_state, d_state], dim=-1)
    lifted = torch.einsum("bklr,kdr->bkld", dt, dt_weight.to(dtype))
    delta = F.softplus(lifted + dt_bias.to(dtype)[:, None])
    decay = torch.exp(delta[..., None] * A.to(dtype)[:, None])  # [B, K, L, D, N]
    drive = (delta * u)[..., None] * b[..., None, :]
    state = x.new_zeros(x.shape[0], n_directions, d_inner, d_state, dtype=dtype)
    outputs = []
    # Unbound once: a slice per position would give the backward pass a full-size gradient each.
    for decay_l, drive_l, c_l in zip(decay.unbind(2), drive.unbind(2), c.unbind(2), strict=True):
        state = decay_l * state + drive_l
        outputs.append(torch.einsum("bkdn,bkn->bkd", state, c_l))
    y = torch.stack(outputs, dim=2) + skip.to(dtype)[:, None] * u
    return narrowed(cross_merge(y, height, width), x.dtype)
