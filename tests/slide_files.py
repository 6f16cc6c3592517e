"""Slides made up for tests, of any size, without holding them in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
_TILE = 256
PAPER = 244


def write_slide(
    path: Path,
    size: tuple[int, int],
    levels: int,
    paint: Callable[[int, int, int], Pixels | None],
    *,
    mpp: float | None = 0.5,
) -> Path:
    """Write a tiled pyramidal TIFF with JPEG tiles.

    Args:
        path: The file.
        size: Width and height of level 0.
        levels: Each half as wide and high as the one before.
        paint: Gives (256, 256, 3) for a tile of a level: its downsample, column and row; None for
            blank paper, which is compressed only once.
        mpp: Microns per pixel of level 0, None to state none.
    """
    blank = _encoded(np.full((_TILE, _TILE, 3), PAPER, np.uint8))

    def tiles(factor: int, shape: tuple[int, int]) -> Iterator[bytes]:
        for row in range(-(-shape[0] // _TILE)):
            for column in range(-(-shape[1] // _TILE)):
                pixels = paint(factor, column, row)
                yield blank if pixels is None else _encoded(pixels)

    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(levels):
            factor = 2**level
            shape = (size[1] // factor, size[0] // factor)
            per_cm = None if mpp is None else 10000 / (mpp * factor)
            file.write(
                tiles(factor, shape),
                shape=(*shape, 3),
                dtype=np.uint8,
                tile=(_TILE, _TILE),
                photometric="ycbcr",
                compression="jpeg",
                subfiletype=1 if level else 0,
                resolution=None if per_cm is None else (per_cm, per_cm),
                resolutionunit=None if per_cm is None else "CENTIMETER",
                metadata=None,
            )
    return path


def _encoded(pixels: Pixels) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(pixels, level=90))


def blobs(
    spots: list[tuple[int, int, int]], seed: int = 3
) -> Callable[[int, int, int], Pixels | None]:
    """Paint purple discs with grain on paper.

    Args:
        spots: Centre and radius of each disc, in level-0 pixels.
        seed: Of the grain.
    """

    def paint(factor: int, column: int, row: int) -> Pixels | None:
        left, top, side = column * _TILE * factor, row * _TILE * factor, _TILE * factor
        near = [
            (x, y, r)
            for x, y, r in spots
            if left - r < x < left + side + r and top - r < y < top + side + r
        ]
        if not near:
            return None
        y, x = np.mgrid[top : top + side : factor, left : left + side : factor]
        pixels = np.full((_TILE, _TILE, 3), PAPER, np.uint8)
        grain = np.random.default_rng((seed, factor, column, row)).integers(0, 60, (_TILE, _TILE))
        for cx, cy, r in near:
            inside = (x - cx) ** 2 + (y - cy) ** 2 < r * r
            pixels[inside] = np.stack([170 - grain, 80 + grain // 2, 180 - grain], -1)[inside]
        return pixels

    return paint
