"""Channel shuffles on the GPU, with concatenation and transposition: ``native/cuda/shuffle.cu``.

Torch does these one after the other, and copies with such strides at a third of the bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambamic.kernels import nvrtc

_VALUES = 1024  # that a block moves at least


def supported(x: Tensor) -> bool:
    """Return whether the kernel takes a tensor like this."""
    return x.is_cuda and x.element_size() in (2, 4) and nvrtc.missing_module() is None


def shuffle(first: Tensor, second: Tensor | None, groups: int, *, transposed: bool) -> Tensor:
    """Concatenate channels, view them as (groups, C / groups), transpose and flatten.

    Args:
        first: (B, H, W, C').
        second: (B, H, W, C - C') of the same dtype, or None.
        groups: Divides C.
        transposed: Whether height and width change places too.

    Returns:
        (B, H, W, C), or (B, W, H, C).
    """
    y: Tensor = _shuffle(first, second, groups, transposed)
    return y


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Return a tensor whose places lie evenly apart, dense in themselves, and how far."""
    batch, height, width, channels = x.stride()
    if channels == 1 and height == width * x.shape[2] and batch == height * x.shape[1]:
        return x, width
    return x.contiguous(), x.shape[3]


def _launch(
    sources: list[Tensor], targets: list[Tensor], groups: int, transposed: bool, bytes_: int
) -> None:
    channels = sum(target.shape[3] for target in targets)
    _, height, width, first_out = targets[0].shape
    rows = targets[0].numel() // first_out
    if rows == 0:
        return
    inputs = [_rows(source) for source in sources]
    macros = {
        "BYTES": bytes_,
        "CHANNELS": channels,
        "GROUPS": groups,
        "FIRST_IN": sources[0].shape[3],
        "FIRST_OUT": first_out,
        "TRANSPOSED": int(transposed),
    }
    (first, stride), (second, second_stride) = inputs[0], inputs[-1]
    nvrtc.launch(
        ("shuffle.cu",),
        "shuffle",
        macros,
        (-(-rows // -(-_VALUES // channels)),),
        256,
        *(first, second, targets[0], targets[-1]),
        *(rows, stride, second_stride, height, width),
    )


@torch.library.custom_op("mambamic::shuffle", mutates_args=())
def _shuffle(first: Tensor, second: Tensor | None, groups: int, transposed: bool) -> Tensor:
    batch, height, width, channels = first.shape
    sources = [first] if second is None else [first, second]
    places = (width, height) if transposed else (height, width)
    channels = sum(source.shape[3] for source in sources)
    out = first.new_empty((batch, *places, channels))
    _launch(sources, [out], groups, transposed, first.element_size())
    return out


@_shuffle.register_fake
def _(first: Tensor, second: Tensor | None, groups: int, transposed: bool) -> Tensor:
    batch, height, width, channels = first.shape
    places = (width, height) if transposed else (height, width)
    return first.new_empty((batch, *places, channels + (0 if second is None else second.shape[3])))


@torch.library.custom_op("mambamic::shuffle_backward", mutates_args=())
def _shuffle_backward(
    grad: Tensor, groups: int, transposed: bool, first_channels: int
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = grad.shape
    places = (width, height) if transposed else (height, width)
    rest = channels - first_channels
    targets = [grad.new_empty((batch, *places, n)) for n in (first_channels, rest)]
    # The reverse of a shuffle is one of as many groups as a group has channels.
    used = targets if rest else targets[:1]
    _launch([grad], used, channels // groups, transposed, grad.element_size())
    return targets[0], targets[1]


@_shuffle_backward.register_fake
def _(grad: Tensor, groups: int, transposed: bool, first_channels: int) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = grad.shape
    places = (width, height) if transposed else (height, width)
    first = grad.new_empty((batch, *places, first_channels))
    return first, grad.new_empty((batch, *places, channels - first_channels))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, groups, transposed = inputs
    ctx.how = groups, transposed, first.shape[3]
    ctx.has_second = second is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    first, second = _shuffle_backward(grad, *ctx.how)
    return first, second if ctx.has_second else None, None, None


_shuffle.register_autograd(_backward, setup_context=_setup_context)
