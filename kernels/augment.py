"""Augmentation of images on the GPU in one pass: launches ``native/cuda/augment.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambamic.kernels import nvrtc

SETTINGS = 22  # floats per image
_THREADS = 256
_STAIN = 1 << 8  # above the eight bits of the order


def augment(
    pixels: Tensor,
    settings: Tensor,
    order: Sequence[int],
    scale: Tensor,
    shift: Tensor,
    *,
    stain: bool = False,
) -> Tensor:
    """Warp images, change their stain and their colours, and normalise them.

    Args:
        pixels: (B, S, S, 3) uint8 on a GPU.
        settings: (B, 22) float32 there: the affine map (2 x 3, row by row) from a place
            (column, row) of the result to one of the image, in pixels; the summand of the
            brightness, the factors of contrast and saturation, and the turn of the hue, 1 being
            the whole circle; the affine map (3 x 4, row by row) of the optical densities of red,
            green and blue.
        order: In which the four changes of colour, counted from 0, follow one another.
        scale: (3,) float32 there; multiplies values between 0 and 1.
        shift: (3,), added afterwards.
        stain: Whether the map of the optical densities is applied, before the colours change.

    Returns:
        (B, 3, S, S) float32, channels last in memory.
    """
    pixels = pixels.contiguous()
    batch, side = pixels.shape[:2]
    out = pixels.new_empty(pixels.shape, dtype=torch.float32)
    code = sum(kind << 2 * step for step, kind in enumerate(order)) | (_STAIN if stain else 0)
    nvrtc.launch(
        ("augment.cu",),
        "augment",
        {},
        (-(-side * side // _THREADS), batch),
        _THREADS,
        *(pixels, settings, scale, shift, out, side, code),
    )
    return out.permute(0, 3, 1, 2)
