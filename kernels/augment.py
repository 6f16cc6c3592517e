"""Augmentation of images on the GPU in one pass: launches ``native/cuda/augment.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambamic.kernels import nvrtc

_THREADS = 256


def augment(
    pixels: Tensor, settings: Tensor, order: Sequence[int], scale: Tensor, shift: Tensor
) -> Tensor:
    """Warp images, change their colours, and normalise them.

    Args:
        pixels: (B, S, S, 3) uint8 on a GPU.
        settings: (B, 10) float32 there: the affine map (2 x 3, row by row) from a place
            (column, row) of the result to one of the image, in pixels, then the summand of the
            brightness, the factors of contrast and saturation, and the turn of the hue, 1 being
            the whole circle.
        order: In which these four, counted from 0, follow one another.
        scale: (3,) float32 there; multiplies values between 0 and 1.
        shift: (3,), added afterwards.

    Returns:
        (B, 3, S, S) float32, channels last in memory.
    """
    pixels = pixels.contiguous()
    batch, side = pixels.shape[:2]
    out = pixels.new_empty(pixels.shape, dtype=torch.float32)
    code = sum(kind << 2 * step for step, kind in enumerate(order))
    nvrtc.launch(
        ("augment.cu",),
        "augment",
        {},
        (-(-side * side // _THREADS), batch),
        _THREADS,
        *(pixels, settings, scale, shift, out, side, code),
    )
    return out.permute(0, 3, 1, 2)
