"""Layer normalisation on the GPU, plain or gated, forward and backward: ``native/cuda/norm.cu``.

Torch's own gives each row a block or a warp, which rows of 24 or 48 channels leave mostly idle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambamic.kernels import nvrtc
from mambamic.kernels.cuda import DTYPES

_VECTOR = 8  # channels that a thread moves at once
_WIDEST = 768  # torch's own is good from here on
_THREADS = 256
_BLOCKS = 1024  # of the backward pass, each with its sum of the parameters' gradients


def supported(x: Tensor) -> bool:
    """Return whether the kernel takes rows like these: on a GPU, of few channels."""
    return (
        x.is_cuda
        and x.dtype in DTYPES
        and x.shape[-1] % _VECTOR == 0
        and x.shape[-1] <= _WIDEST
        and nvrtc.missing_module() is None
    )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None = None
) -> Tensor:
    """Normalise the last dimension, and multiply by the SiLU of a gate where one is given.

    Args:
        x: (..., C), see ``supported``.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        gate: Of the shape of ``x``.

    Returns:
        The shape and dtype of ``x``; sums are float32.
    """
    gate = None if gate is None else gate.to(x.dtype)
    y: Tensor = _layer_norm(x, weight, bias, gate, eps)
    return y


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return a tensor whose rows lie evenly apart, dense and aligned in themselves, and how far."""
    width, strides = tensor.shape[-1], tensor.stride()
    step = strides[-2] if tensor.ndim > 1 else width
    even = all(
        outer == inner * size
        for outer, inner, size in zip(strides[:-2], strides[1:-1], tensor.shape[1:-1], strict=True)
    )
    aligned = step % _VECTOR == 0 and tensor.data_ptr() % 16 == 0
    if even and aligned and strides[-1] == 1 and step >= width:
        return tensor, step
    tensor = tensor.contiguous()
    return (tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()), width


def _lanes(width: int) -> int:
    """Return how many threads share a row, as in the kernel."""
    vectors = width // _VECTOR
    return next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes >= min(vectors, 32))


@torch.library.custom_op("mambamic::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.numel() // width
    if rows == 0:
        return out
    x, stride = _rows(x)
    # Without a gate the kernel reads none, whatever stands in its place.
    gated, gate_stride = (x, 0) if gate is None else _rows(gate)
    nvrtc.launch(
        ("elements.cuh", "norm.cu"),
        "norm_forward",
        {"DTYPE": DTYPES[x.dtype], "WIDTH": width, "GATED": int(gate is not None)},
        (-(-rows * _lanes(width) // _THREADS),),
        _THREADS,
        *(x, gated, weight.float(), bias.float(), out),
        *(rows, stride, gate_stride, eps),
    )
    return out


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mambamic::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.numel() // width
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_gate = torch.empty_like(grad_x) if gate is not None else grad_x.new_empty(0)
    blocks = min(_BLOCKS, -(-rows * _lanes(width) // _THREADS))
    sums = x.new_zeros((blocks, 2, width), dtype=torch.float32)
    if rows:
        x, stride = _rows(x)
        grad, grad_stride = _rows(grad.to(x.dtype))
        gated, gate_stride = (x, 0) if gate is None else _rows(gate)
        nvrtc.launch(
            ("elements.cuh", "norm.cu"),
            "norm_backward",
            {"DTYPE": DTYPES[x.dtype], "WIDTH": width, "GATED": int(gate is not None)},
            (blocks,),
            _THREADS,
            *(grad, x, gated, weight.float(), bias.float(), grad_x, grad_gate, sums),
            *(rows, grad_stride, stride, gate_stride, eps),
        )
    of_weight, of_bias = sums.sum(0).unbind()
    return grad_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype, copy=True), grad_gate


@_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_gate = x.new_empty(0 if gate is None else gate.shape)
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias), like_gate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, gate, eps = inputs
    ctx.save_for_backward(x, weight, bias, gate)
    ctx.eps = eps


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *of, of_gate = _layer_norm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return (*of, of_gate if of_gate.numel() else None, None)


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
