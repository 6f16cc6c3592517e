"""Fused layers of the inference graphs on the GPU: what stands between matrix products and scans.

Images are (B, H, W, C), contiguous, in float32, float16 or bfloat16; arithmetic is float32, and
so are the parameters. The kernels are in ``native/cuda``; their numbers of channels must be
multiples of eight. Nothing here waits for the device, so that all of it can be captured in a
CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambamic.kernels import nvrtc
from mambamic.kernels.cuda import DTYPES

_VECTOR = 8  # channels that a thread moves at once
_THREADS = 256
# Neighbouring places of a row that a thread of a depthwise kernel computes: the first that makes
# enough threads, or the last. The longest divides 56, 28, 14 and 7.
_STRIPS = (7, 2, 1)
_ENOUGH = 132 * 512
_EACH = 4  # for so many channels
_ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2}
_STEM_BAND, _STEM_SPAN, _STEM_RUN = 4, 56, 4


def _rows(
    name: str, width: int, rows: int, like: Tensor, *arguments: Tensor | float | None
) -> None:
    vectors = width // _VECTOR
    lanes = next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes >= min(vectors, 32))
    nvrtc.launch(
        ("elements.cuh", "rows.cu"),
        name,
        {"DTYPE": DTYPES[like.dtype], "WIDTH": width},
        (-(-rows * lanes // _THREADS),),
        _THREADS,
        *arguments,
    )


def _positions(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def gather_norm(
    x: Tensor,
    gate: Tensor | None,
    offset: Tensor | None,
    gather: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Normalise the right half of the channels, and write it in another order.

    Args:
        x: (B, H, W, 2 C).
        gate: (B, 2 C) float32, which multiplies x; None for ones.
        offset: (C,), which is added to the right half; None for zeros.
        gather: (C,) int32, for each output the place in the right half where it comes from.
        weight: (C,), by output.
        bias: (C,), likewise.

    Returns:
        (B, H, W, C).
    """
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    rows = _positions(x)
    _rows(
        "gather_norm", width, rows, x,
        x, gate, offset, gather, weight, bias, out, rows, x.shape[1] * x.shape[2],
    )  # fmt: skip
    return out


def split_norm(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and shift the left half of the channels, and normalise the right half.

    Args:
        x: (B, H, W, 2 C).
        scale: (C,).
        shift: (C,).
        weight: (C,), of the norm.
        bias: (C,), of the norm.

    Returns:
        Two of (B, H, W, C).
    """
    width = x.shape[-1] // 2
    left, right = (x.new_empty((*x.shape[:-1], width)) for _ in range(2))
    rows = _positions(x)
    _rows("split_norm", width, rows, x, x, scale, shift, weight, bias, left, right, rows)
    return left, right


def gated_norm(y: Tensor, projected: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the scan's output and multiply it by the SiLU of the gate.

    Args:
        y: (B, H, W, G, D).
        projected: (B, H, W, 2 G D): the scanned half, which is not read, then the gate.
        weight: (D,).
        bias: (D,).

    Returns:
        (B, H, W, G D).
    """
    *image, chunks, width = y.shape
    out = y.new_empty((*image, chunks * width))
    rows = _positions(y) * chunks
    _rows("gated_norm", width, rows, y, y, projected, weight, bias, out, rows, chunks)
    return out


def transposed_residual_norm(
    x: Tensor, filtered: Tensor, scale: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Add the SiLU of a map with height and width exchanged to the scaled image; normalise.

    Args:
        x: (B, H, H, C).
        filtered: (B, H, H, C or more); the first C are read.
        scale: Of x.
        weight: (C,).
        bias: (C,).

    Returns:
        (B, H, H, C).
    """
    out = torch.empty_like(x)
    rows, side, width = _positions(x), x.shape[1], x.shape[-1]
    _rows(
        "transposed_residual_norm", width, rows, x,
        x, filtered, weight, bias, out, rows, side, filtered.shape[-1], scale,
    )  # fmt: skip
    return out


def merge_norm(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """Concatenate the four phases of each 2x2 patch and normalise.

    Args:
        x: (B, H, W, C); an odd last row or column is left out.
        gate: (B, C) float32, which multiplies x; None for ones.
        weight: (4 C,).
        bias: (4 C,).

    Returns:
        (B, H // 2, W // 2, 4 C).
    """
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, height // 2, width // 2, 4 * channels))
    rows = _positions(out)
    _rows("merge_norm", 4 * channels, rows, x, x, gate, weight, bias, out, rows, height, width)
    return out


def norm_(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the channels in place and return ``x``."""
    rows = x.numel() // x.shape[-1]
    _rows("norm_rows", x.shape[-1], rows, x, x, weight, bias, rows)
    return x


def _strip(rows: int, width: int, channels: int) -> int:
    for strip in _STRIPS:
        if rows * -(-width // strip) * (channels // _EACH) >= _ENOUGH:
            return strip
    return _STRIPS[-1]


def depthwise(
    x: Tensor,
    channels: int,
    taps: Tensor,
    bias: Tensor,
    activation: str,
    *,
    offset: int = 0,
    input_silu: bool = False,
    affine: tuple[Tensor, Tensor, Tensor | None] | None = None,
    scatter: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve depthwise by 3x3 with zero padding, and activate.

    Args:
        x: (B, H, W, any); ``channels`` of it are convolved, from ``offset`` on.
        channels: C.
        taps: (9, C) or, for two outputs per channel, (9, 2 C).
        bias: (C,) or (2 C,).
        activation: ``none``, ``relu`` or ``silu``.
        offset: The first channel.
        input_silu: Apply SiLU to x first.
        affine: A scale (C,), a shift (C,) and a gate (B, any) or None, which multiplies the
            scale: applied to x before the convolution, inside the image only.
        scatter: With ``out``: the place in its rows of each output channel, or -1 to drop it.
        out: Where to write; it may be x itself if no place is both read and written.

    Returns:
        ``out``, or (B, H, W, C or 2 C).
    """
    batch, height, width, stride = x.shape
    outputs = taps.shape[1]
    if out is None:
        out = x.new_empty((batch, height, width, outputs))
    scale, shift, gate = affine or (None, None, None)
    strip = _strip(batch * height, width, outputs)
    items = batch * height * -(-width // strip) * (outputs // _EACH)
    nvrtc.launch(
        ("elements.cuh", "depthwise.cu"),
        "depthwise",
        {
            "DTYPE": DTYPES[x.dtype],
            "CHANNELS": channels,
            "MULTIPLIER": outputs // channels,
            "AFFINE": int(affine is not None),
            "STRIP": strip,
            "EACH": _EACH,
            "INPUT_SILU": int(input_silu),
            "ACTIVATION": _ACTIVATIONS[activation],
        },
        (-(-items // _THREADS),),
        _THREADS,
        *(x[..., offset:], scale, shift, gate, taps, bias, scatter, out),
        *(items, height, width, stride, out.shape[-1], 0 if gate is None else gate.shape[1]),
    )
    return out


def interact(
    local: Tensor,
    global_: Tensor,
    taps: Tensor,
    bias: Tensor,
    attention: Tensor,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask each branch by the other's depthwise convolution, and weigh the channels.

    Args:
        local: (B, H, W, C), before its last ReLU.
        global_: (B, H, W, C).
        taps: (9, C).
        bias: (C,).
        attention: (2 C,), by output.
        keep: False where only the means are wanted.

    Returns:
        The masked branches (B, H, W, 2 C), not yet weighed (empty unless ``keep``); their
        channels are the first half of the masked global and of the masked local branch, then
        the second halves. The channel attention's gate (B, 2 C), float32. The weighed channels'
        means over all positions (B, 2 C), float32.
    """
    batch, height, width, channels = local.shape
    strip, vectors = _strip(batch * height, width, channels), channels // _EACH
    threads = _THREADS // vectors * vectors
    blocks = -(-height * -(-width // strip) * vectors // threads)
    out = local.new_empty((batch, height, width, 2 * channels) if keep else (0,))
    sums = local.new_empty((batch, blocks, 2 * channels), dtype=torch.float32)
    gate, means = (sums.new_empty((batch, 2 * channels)) for _ in range(2))
    macros = {"CHANNELS": channels, "MULTIPLIER": 1, "STRIP": strip, "EACH": _EACH}
    nvrtc.launch(
        ("elements.cuh", "depthwise.cu"),
        "interact",
        {"DTYPE": DTYPES[local.dtype], **macros},
        (blocks, batch),
        threads,
        *(local, global_, taps, bias, out, sums, height, width, int(keep)),
    )
    nvrtc.launch(
        ("elements.cuh", "depthwise.cu"),
        "attention",
        {"DTYPE": DTYPES[local.dtype], **macros},
        (batch,),
        min(1024, -(-2 * channels // 32) * 32),
        *(sums, attention, gate, means, 2 * channels, blocks, 1.0 / (height * width)),
    )
    return out, gate, means


def stem(
    pixels: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """Normalise pixels, convolve them by 3x3 with stride 2 and zero padding, and apply GELU.

    Args:
        pixels: (B, H, W, 3) uint8.
        scale: (3,).
        shift: (3,), added after scaling.
        weight: (27, O): by row, column and colour.
        bias: (O,).
        dtype: Of the result.

    Returns:
        (B, ceil(H / 2), ceil(W / 2), O).
    """
    batch, height, width, _ = pixels.shape
    outputs, out_height, out_width = weight.shape[1], -(-height // 2), -(-width // 2)
    out = torch.empty((batch, out_height, out_width, outputs), dtype=dtype, device=pixels.device)
    nvrtc.launch(
        ("elements.cuh", "pixels.cu"),
        "stem",
        {"DTYPE": DTYPES[dtype], "OUTPUTS": outputs},
        (-(-out_width // _STEM_SPAN), -(-out_height // _STEM_BAND), batch),
        _STEM_BAND * _STEM_SPAN // _STEM_RUN * outputs // _VECTOR,
        *(pixels, scale, shift, weight, bias, out, height, width, out_height, out_width),
    )
    return out


def patches(pixels: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise pixels and lay each 4x4 patch out as a row.

    Args:
        pixels: (B, H, W, 3) uint8; the remainders of height and width by 4 are left out.
        scale: (3,).
        shift: (3,), added after scaling.
        dtype: Of the result.

    Returns:
        (B, H // 4, W // 4, 48): by row, column and colour.
    """
    batch, height, width, _ = pixels.shape
    out = torch.empty((batch, height // 4, width // 4, 48), dtype=dtype, device=pixels.device)
    items = out.numel() // 12
    nvrtc.launch(
        ("elements.cuh", "pixels.cu"),
        "patches",
        {"DTYPE": DTYPES[dtype]},
        (-(-items // _THREADS),),
        _THREADS,
        *(pixels, scale, shift, out, items, height, width),
    )
    return out


def interleave_add_(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ReLU of ``left`` to the even channels of ``x``, ``right`` to the odd ones, in place.

    Args:
        x: (B, H, W, 2 C).
        left: (B, H, W, C).
        right: (B, H, W, C).
    """
    items = left.numel() // _VECTOR
    nvrtc.launch(
        ("elements.cuh", "pixels.cu"),
        "interleave_add",
        {"DTYPE": DTYPES[x.dtype]},
        (-(-items // _THREADS),),
        _THREADS,
        *(x, left, right, items),
    )
    return x
