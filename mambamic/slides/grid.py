"""Where the tiles of a slide lie, and in which order they are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mambamic.slides.resolution import best_level
from mambamic.slides.source import SlideInfo

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How a slide is cut into tiles.

    Args:
        level: The pyramid level that is read.
        read_size: Width and height of a tile, in pixels of that level.
        size: Width and height of a tile, in level-0 pixels.
        step: From one tile to the next, in level-0 pixels; not always whole.
        ratio: Microns per pixel asked for, over those of level 0; 1 for the slide's own pixels.
    """

    level: int
    read_size: int
    size: int
    step: float
    ratio: float


def lay_out(
    info: SlideInfo, tile: int, stride: int, ratio: float, *, level: int | None = None
) -> Layout:
    """Choose the level, and how many of its pixels make a tile.

    Args:
        info: Of the slide.
        tile: Side of a tile in pixels of the asked resolution.
        stride: From one tile to the next, in the same pixels.
        ratio: Microns per pixel asked for, over those of level 0.
        level: Read this one, whatever is best; to measure what the choice is worth.
    """
    chosen = best_level(info.downsamples, ratio) if level is None else level
    return Layout(
        level=chosen,
        read_size=max(1, round(tile * ratio / info.downsamples[chosen])),
        size=max(1, round(tile * ratio)),
        step=stride * ratio,
        ratio=ratio,
    )


def positions(info: SlideInfo, layout: Layout) -> tuple[Integers, Integers]:
    """Return left and top of every whole tile within the slide's bounds, in reading order.

    The order follows a Z-shaped curve over the grid: tiles that come one after the other lie close
    together, so that a compressed block of the file that several of them share is decoded once, and
    every run of tiles is a region of the slide.
    """
    left, top, width, height = info.bounds
    columns = _count(width, layout)
    rows = _count(height, layout)
    column, row = np.meshgrid(np.arange(columns), np.arange(rows))
    flat_column, flat_row = column.ravel().astype(np.uint64), row.ravel().astype(np.uint64)
    order = np.argsort(_spread(flat_column) | (_spread(flat_row) << np.uint64(1)), kind="stable")
    x = left + np.rint(flat_column[order] * layout.step).astype(np.int64)
    y = top + np.rint(flat_row[order] * layout.step).astype(np.int64)
    return x, y


def _count(extent: int, layout: Layout) -> int:
    # The last tile ends within the slide, half a pixel of rounding allowed.
    return max(0, int((extent - layout.size + 0.5) // layout.step) + 1)


def _spread(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Put a zero bit before each bit of numbers of at most 32 bits."""
    spread = values
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        spread = (spread | (spread << np.uint64(shift))) & np.uint64(mask)
    return spread
