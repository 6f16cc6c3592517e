"""The scan alone: from x and the projections in image layout to the merged output."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mambamic.benchmark.timing import Timing, captured, device_ms
from mambamic.kernels import cuda, selective_scan_2d

Shape = tuple[int, int, int, int]

# Sequences per image, side, d_inner and dt_rank of the four stages of each network's T variant.
# MambaMIC scans four chunks of its channels as four images.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "mambamic": ((4, 56, 24, 1), (4, 28, 48, 2), (4, 14, 96, 3), (4, 7, 192, 6)),
    "medmamba": ((1, 56, 96, 3), (1, 28, 192, 6), (1, 14, 384, 12), (1, 7, 768, 24)),
}
_D_STATE = 16


def make_inputs(
    batch: int, side: int, d_inner: int, rank: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return x, projections, dt_weight, dt_bias, A and skip, as a fresh model has them."""
    image = [
        torch.randn(batch, side, side, d_inner, device=device),
        torch.randn(batch, side, side, 4, rank + 2 * _D_STATE, device=device),
    ]
    weights = [
        torch.randn(4, d_inner, rank, device=device) * rank**-0.5,
        torch.rand(4, d_inner, device=device) * 4 - 5,
        -torch.arange(1.0, _D_STATE + 1, device=device).repeat(4, d_inner, 1),
        torch.ones(4, d_inner, device=device),
    ]
    return [tensor.to(dtype) for tensor in image] + weights


def sets_past_the_caches(shape: Shape, device: torch.device, dtype: torch.dtype) -> int:
    """Return how many sets of tensors are twice as large as a GPU's second-level cache."""
    if device.type != "cuda":
        return 1
    batch, side, d_inner, rank = shape
    values = batch * side * side * (d_inner + 4 * (rank + 2 * _D_STATE))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(2 * cache / (values * dtype.itemsize)))


def forward_call(inputs: list[Tensor], backend: str) -> Callable[[], Tensor]:
    """Return a forward scan as inference calls it: on a GPU with packed projections.

    Args:
        inputs: From ``make_inputs``.
        backend: Of the scan.
    """
    if backend != "cuda":
        return partial(selective_scan_2d, *inputs, backend=backend)
    x, projections, *weights = inputs
    # The layers before the scan give their values in this order at no cost.
    values = cuda.pack_projection(projections.new_zeros(4, projections.shape[-1], 1)).shape[0]
    packed = torch.randn(*x.shape[:3], values, device=x.device).to(x.dtype)
    return partial(cuda.scan_inference, x, packed, cuda.ScanWeights.of(*weights))


def forward_ms(
    shape: Shape,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    timing: Timing,
) -> float:
    """Return the median time of a forward scan, its launch not counted.

    Args:
        shape: Batch, side, d_inner and dt_rank.
        backend: Of the scan.
        device: Where.
        dtype: Of x and the projections.
        timing: Of rounds over several sets of tensors, together larger than the caches: a scan
            reads what it reads from memory.
    """

    def prepare() -> list[Callable[[], Any]]:
        return [
            forward_call(make_inputs(*shape, device, dtype), backend)
            for _ in range(sets_past_the_caches(shape, device, dtype))
        ]

    with torch.inference_mode():
        work, calls = captured(prepare, device)
        return statistics.median(device_ms(work, timing, device)) / calls


def backward_ms(
    shape: Shape,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    timing: Timing,
) -> float:
    """Return the median time of a backward scan; arguments as of ``forward_ms``."""

    def prepare() -> list[Callable[[], Any]]:
        calls: list[Callable[[], Any]] = []
        for _ in range(sets_past_the_caches(shape, device, dtype)):
            tracked = [tensor.requires_grad_() for tensor in make_inputs(*shape, device, dtype)]
            y = selective_scan_2d(*tracked, backend=backend)
            arriving = torch.randn_like(y)
            calls.append(partial(torch.autograd.grad, y, tracked, arriving, retain_graph=True))
        return calls

    work, calls = captured(prepare, device)
    return statistics.median(device_ms(work, timing, device)) / calls


def measure(
    shape: Shape,
    images: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    timing: Timing,
) -> dict[str, Any]:
    """Time one shape, forward and backward.

    Args:
        shape: One of those in ``SHAPES``.
        images: How many times as many sequences.
        backend: Of the scan.
        device: Where.
        dtype: Of x and the projections.
        timing: Of rounds over several sets of tensors.
    """
    per_image, side, d_inner, rank = shape
    whole = (per_image * images, side, d_inner, rank)
    return {
        "shape": [per_image * images, 4, d_inner, side * side],
        "dt_rank": rank,
        "forward_ms": round(forward_ms(whole, backend, device, dtype, timing), 4),
        "backward_ms": round(backward_ms(whole, backend, device, dtype, timing), 4),
    }
