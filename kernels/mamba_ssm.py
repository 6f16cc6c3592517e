"""The scan by the published kernel: ``selective_scan_cuda``, which the package mamba_ssm builds.

For those who have mamba_ssm installed and want its arithmetic; ``backend="mamba_ssm"`` asks for
it, ``auto`` never does. The compiled module is called by itself: importing ``mamba_ssm`` brings
language models along, and takes seconds. As in both networks' published code the four
sequences are materialised and scanned in float32, whatever the dtype of the image.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from mambamic.kernels import cuda
from mambamic.kernels.reference import cross_merge, cross_scan, narrowed

_CHUNK = 2048  # positions between two of the states that the kernel keeps for its backward pass
_BUILD = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation "
    "'mambamic[mamba-ssm]'"
)


def unavailable() -> str | None:
    """Return why this backend cannot be used here and how to get it, or None when it can."""
    return _missing() if torch.cuda.is_available() else cuda.unavailable()


@functools.cache
def _missing() -> str | None:
    """Return what is wrong with the package; looked up once, as every scan asks."""
    if importlib.util.find_spec("selective_scan_cuda") is None:
        if importlib.util.find_spec("mamba_ssm") is None:
            return f"the optional package mamba_ssm is not installed: {_BUILD}"
        return f"mamba_ssm was built without its Mamba-1 scan: uninstall it, then {_BUILD}"
    try:
        _kernel()
    except ImportError as error:
        return f"mamba_ssm was built for another torch ({error}): uninstall it, then {_BUILD}"
    return None


@functools.cache
def _kernel() -> ModuleType:
    return importlib.import_module("selective_scan_cuda")


def describe() -> str:
    """Return how the kernel comes about, for humans."""
    return "selective_scan_cuda, as mamba_ssm built it; float32"


def states_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states that ``forward`` keeps for ``backward``."""
    batch, height, width, d_inner = x.shape
    return batch, A.shape[0] * d_inner, -(-height * width // _CHUNK), 2 * A.shape[-1]


def forward(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Scan; shapes as in ``reference.selective_scan_2d``.

    Returns:
        y (B, H, W, D) in the dtype of ``x``, and the kernel's states, empty unless ``keep``.
    """
    if x.numel() == 0:
        kept = states_shape(x, A) if keep else (0,)
        return torch.empty_like(x), x.new_empty(kept, dtype=torch.float32)
    inputs, _ = _sequences(x, projections, dt_weight, dt_bias, A, skip)
    y, states = _kernel().fwd(*inputs[:6], None, inputs[6], True)
    merged = cross_merge(_channels_last(y, dt_weight.shape[0]), *x.shape[1:3])
    return narrowed(merged, x.dtype).contiguous(), states if keep else states.new_empty(0)


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

    Each comes in the dtype of what it belongs to. The kernel adds those of B and C with float
    atomics: they are not deterministic.
    """
    tensors = (x, projections, dt_weight, dt_bias, A, skip)
    if x.numel() == 0:
        of_x, of_projections, *others = (torch.zeros_like(tensor) for tensor in tensors)
        return of_x, of_projections, others[0], others[1], others[2], others[3]
    (n_directions, d_inner, _), (height, width) = dt_weight.shape, x.shape[1:3]
    inputs, low_rank = _sequences(*tensors)
    arriving = cross_scan(grad_y.float().unsqueeze(3).expand(-1, -1, -1, n_directions, -1))
    of_u, of_delta, of_A, of_B, of_C, of_skip, of_bias = _kernel().bwd(
        *inputs[:6], None, inputs[6], _channels_first(arriving), states, None, None, True, False
    )
    of_x = cross_merge(_channels_last(of_u, n_directions), height, width)
    of_delta = of_delta.unflatten(1, (n_directions, d_inner))  # [B, K, D, L]
    with torch.autocast("cuda", enabled=False):
        of_low_rank = torch.einsum("bkdl,kdr->bklr", of_delta, dt_weight.float())
        of_weight = torch.einsum("bkdl,bklr->kdr", of_delta, low_rank)
    sequences = torch.cat([of_low_rank, of_B.transpose(2, 3), of_C.transpose(2, 3)], -1)
    return (
        of_x.to(x.dtype).contiguous(),
        to_image(sequences, height, width).to(projections.dtype),
        of_weight.to(dt_weight.dtype).contiguous(),
        of_bias.view_as(dt_bias).to(dt_bias.dtype),
        of_A.view_as(A).to(A.dtype),
        of_skip.view_as(skip).to(skip.dtype),
    )


def to_image(sequences: Tensor, height: int, width: int) -> Tensor:
    """Put four sequences back in image order, each direction by itself; undoes ``cross_scan``.

    Args:
        sequences: (B, K, L, C) in scan order.
        height: H.
        width: W, with H * W = L.

    Returns:
        (B, H, W, K, C).
    """
    one, two, three, four = sequences.unbind(1)
    by_rows = torch.stack([one, three.flip(1)], 2).unflatten(1, (height, width))
    by_columns = torch.stack([two, four.flip(1)], 2).unflatten(1, (width, height))
    columns = by_columns.transpose(1, 2)
    return torch.stack([by_rows[..., 0, :], columns[..., 0, :],
                        by_rows[..., 1, :], columns[..., 1, :]], 3)  # fmt: skip


def _sequences(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, skip: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return what the kernel takes (u, delta, A, B, C, D, delta_bias), and dt (B, K, L, R)."""
    n_directions, _, rank = dt_weight.shape
    d_state = A.shape[-1]
    u = cross_scan(x.float().unsqueeze(3).expand(-1, -1, -1, n_directions, -1))
    low_rank, b, c = cross_scan(projections.float()).split([rank, d_state, d_state], dim=-1)
    # Autocast would lift the steps in half precision.
    with torch.autocast("cuda", enabled=False):
        delta = torch.einsum("kdr,bklr->bkdl", dt_weight.float(), low_rank)
    inputs = [
        _channels_first(u),
        delta.flatten(1, 2).contiguous(),
        A.float().flatten(0, 1).contiguous(),
        b.transpose(2, 3).contiguous(),
        c.transpose(2, 3).contiguous(),
        skip.float().flatten().contiguous(),
        dt_bias.float().flatten().contiguous(),
    ]
    return inputs, low_rank


def _channels_first(sequences: Tensor) -> Tensor:
    """(B, K, L, C) to (B, K C, L), contiguous."""
    return sequences.transpose(2, 3).flatten(1, 2).contiguous()


def _channels_last(sequences: Tensor, n_directions: int) -> Tensor:
    """(B, K C, L) to (B, K, L, C)."""
    split: Tensor = sequences.unflatten(1, (n_directions, -1))
    return split.transpose(2, 3)
