"""Batch normalisation with ReLU in training, on the GPU: ``native/cuda/batch_norm.cu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambamic.kernels import nvrtc
from mambamic.kernels.cuda import DTYPES

_VECTOR, _THREADS = 8, 256
_MOST_CHANNELS = 2048
_BLOCKS = 528  # four for each of a large GPU's multiprocessors


def supported(x: Tensor) -> bool:
    """Return whether the kernels take (B, C, H, W) like these: on a GPU, channels last."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and x.numel() > 0
        and x.shape[1] % _VECTOR == 0
        and x.shape[1] <= _MOST_CHANNELS
        and not torch.compiler.is_compiling()
        and nvrtc.missing_module() is None
    )


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: float,
    eps: float,
    *,
    relu: bool,
) -> Tensor:
    """Normalise over batch, height and width, as ``F.batch_norm`` does in training.

    Args:
        x: (B, C, H, W), see ``supported``.
        running_mean: (C,) float32, as ``running_var`` brought up to date.
        running_var: (C,).
        weight: (C,).
        bias: (C,).
        momentum: Weight of this batch in the running statistics.
        eps: Added to the variance.
        relu: Whether what is negative becomes 0.

    Returns:
        The shape and dtype of ``x``, channels last.
    """
    rows = x.permute(0, 2, 3, 1).contiguous()
    statistics = torch.empty((4, x.shape[1]), dtype=torch.float32, device=x.device)
    with torch.no_grad():
        sums = _launch_sums("batch_norm_sums", rows, relu, rows)
        _launch(
            "batch_norm_statistics",
            rows,
            relu,
            -(-x.shape[1] * 32 // _THREADS),
            *(rows, sums, weight.float(), bias.float(), statistics, running_mean, running_var),
            *(_count(rows), len(sums), momentum, eps),
        )
    y: Tensor = _Normalise.apply(rows, weight, bias, statistics, relu)  # type: ignore[no-untyped-call]
    return y.permute(0, 3, 1, 2)


def _count(rows: Tensor) -> int:
    return rows.numel() // rows.shape[-1]


def _blocks(rows: Tensor) -> int:
    at_once = _THREADS // (rows.shape[-1] // _VECTOR)
    return min(_BLOCKS, -(-_count(rows) // at_once))


def _launch(
    name: str, rows: Tensor, relu: bool, blocks: int, *arguments: Tensor | int | float
) -> None:
    macros = {"DTYPE": DTYPES[rows.dtype], "CHANNELS": rows.shape[-1], "RELU": int(relu)}
    sources = ("elements.cuh", "batch_norm.cu")
    nvrtc.launch(sources, name, macros, (blocks,), _THREADS, *arguments)


def _launch_sums(name: str, rows: Tensor, relu: bool, *arguments: Tensor) -> Tensor:
    blocks = _blocks(rows)
    sums = torch.empty((blocks, 2, rows.shape[-1]), dtype=torch.float32, device=rows.device)
    _launch(name, rows, relu, blocks, *arguments, sums, _count(rows))
    return sums


class _Normalise(torch.autograd.Function):
    """The normalisation by statistics that depend on the input."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, statistics)
        ctx.relu = relu
        out = torch.empty_like(rows)
        _launch("batch_norm_apply", rows, relu, _blocks(rows), rows, statistics, out, _count(rows))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, statistics = ctx.saved_tensors
        grad, count = grad.contiguous(), _count(rows)
        sums = _launch_sums("batch_norm_grad_sums", rows, ctx.relu, grad, rows, statistics)
        totals = torch.empty((2, rows.shape[-1]), dtype=torch.float32, device=rows.device)
        blocks = -(-rows.shape[-1] * 32 // _THREADS)
        _launch("batch_norm_grad_total", rows, ctx.relu, blocks, sums, totals, len(sums))
        grad_x = torch.empty_like(rows)
        arguments = (grad, rows, statistics, totals, grad_x, count)
        _launch("batch_norm_grad", rows, ctx.relu, _blocks(rows), *arguments)
        return grad_x, totals[1].to(weight.dtype), totals[0].to(bias.dtype), None, None
