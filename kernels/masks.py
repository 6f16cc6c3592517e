"""The masks between MambaMIC's branches on the GPU: launches ``native/cuda/masks.cu``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambamic.kernels import nvrtc
from mambamic.kernels.cuda import DTYPES

_VECTOR, _THREADS = 8, 256


def supported(*tensors: Tensor) -> bool:
    """Return whether the kernel takes these: on a GPU, of one dtype and shape."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.dtype in DTYPES
        and first.numel() % _VECTOR == 0
        and all(t.dtype == first.dtype and t.shape == first.shape for t in tensors)
        and nvrtc.missing_module() is None
    )


def masks(
    from_local: Tensor, from_global: Tensor, local: Tensor, global_: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sigmoid(relu(from_local)) * global_ and sigmoid(gelu(from_global)) * local.

    Args:
        from_local: Of any shape, as the others; see ``supported``.
        from_global: What the second mask is made of.
        local: Masked by ``from_global``.
        global_: Masked by ``from_local``.
    """
    a, b = _masks(from_local, from_global, local, global_)
    return a, b


def _launch(name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    first = outputs[0]
    vectors = first.numel() // _VECTOR
    if vectors == 0:
        return
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    # The kernel moves 16 bytes at once.
    inputs = tuple(t if t.data_ptr() % 16 == 0 else t.clone() for t in inputs)
    nvrtc.launch(
        ("elements.cuh", "masks.cu"),
        name,
        {"DTYPE": DTYPES[first.dtype]},
        (-(-vectors // _THREADS),),
        _THREADS,
        *inputs,
        *outputs,
        vectors,
    )


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@torch.library.custom_op("mambamic::masks", mutates_args=())
def _masks(
    from_local: Tensor, from_global: Tensor, local: Tensor, global_: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = _empty(local), _empty(local)
    _launch("masks_forward", (from_local, from_global, local, global_), outputs)
    return outputs


@_masks.register_fake
def _(
    from_local: Tensor, from_global: Tensor, local: Tensor, global_: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty(local), _empty(local)


@torch.library.custom_op("mambamic::masks_backward", mutates_args=())
def _masks_backward(
    grad_a: Tensor,
    grad_b: Tensor,
    from_local: Tensor,
    from_global: Tensor,
    local: Tensor,
    global_: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty(local), _empty(local), _empty(local), _empty(local)
    inputs = (grad_a, grad_b, from_local, from_global, local, global_)
    _launch("masks_backward", inputs, outputs)
    return outputs


@_masks_backward.register_fake
def _(
    grad_a: Tensor,
    grad_b: Tensor,
    from_local: Tensor,
    from_global: Tensor,
    local: Tensor,
    global_: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(local), _empty(local), _empty(local), _empty(local)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = _masks_backward(grad_a, grad_b, *ctx.saved_tensors)
    return result


_masks.register_autograd(_backward, setup_context=_setup_context)
