"""Heat maps: what the tiles of a slide say, laid over its overview."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mambamic.preprocess import Pixels
from mambamic.slides.colours import Colour, heat_table

Floats = NDArray[np.float32]
_SIDE = 1400  # of the overlay
_OPAQUE = 190  # of 255: a layer alone still shows that something lies below


class TileMap:
    """Means over the tiles that cover each pixel of an overview.

    Args:
        x: (N,) left of the tiles, in level-0 pixels.
        y: (N,) top.
        size: Side of a tile.
        slide: Width and height of level 0.
        shape: Height and width of the map.
    """

    def __init__(
        self,
        x: NDArray[np.int64],
        y: NDArray[np.int64],
        size: int,
        slide: tuple[int, int],
        shape: tuple[int, int],
    ) -> None:
        across, down = shape[1] / slide[0], shape[0] / slide[1]
        self._columns = _Edges(x * across, (x + size) * across, shape[1])
        self._rows = _Edges(y * down, (y + size) * down, shape[0])
        self._counts = self._sum(np.ones(len(x)))
        self.count = self._spread(self._counts)

    def mean(self, values: Floats) -> Floats:
        """Return (h, w): the mean of a value over the tiles at each pixel, 0 where none is."""
        means = self._sum(values) / np.maximum(self._counts, 1)
        mean: Floats = self._spread(means.astype(np.float32))
        return mean

    def _sum(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        # Each tile as four corners, then running sums: the cost does not grow with their size.
        corners = np.zeros((self._rows.count, self._columns.count))
        for row, column, sign in (
            (self._rows.first, self._columns.first, 1),
            (self._rows.first, self._columns.last, -1),
            (self._rows.last, self._columns.first, -1),
            (self._rows.last, self._columns.last, 1),
        ):
            np.add.at(corners, (row, column), sign * values)
        total: NDArray[np.float64] = corners.cumsum(0).cumsum(1)
        return np.rint(total * 2**20) / 2**20  # what is left of rounding where nothing lies

    def _spread(self, cells: NDArray[Any]) -> NDArray[Any]:
        return cells[self._rows.of_pixel[:, np.newaxis], self._columns.of_pixel]


class _Edges:
    """One axis of a map, cut where tiles begin or end: between two cuts all its pixels are alike.

    Tiles of a grid have few cuts, far fewer than there are pixels, and no map has more.

    Args:
        start: (N,) of the tiles, in pixels.
        end: (N,), likewise.
        pixels: Of the axis.
    """

    def __init__(self, start: NDArray[np.floating], end: NDArray[np.floating], pixels: int) -> None:
        first = np.rint(start).astype(np.int64)
        last = np.maximum(np.rint(end).astype(np.int64), first + 1)
        first, last = np.minimum(first, pixels), np.minimum(last, pixels)
        cuts = np.unique(np.concatenate([[0], first, last]))
        self.count = len(cuts)
        self.first, self.last = np.searchsorted(cuts, first), np.searchsorted(cuts, last)
        self.of_pixel = np.searchsorted(cuts, np.arange(pixels), side="right") - 1


def class_layer(
    means: Sequence[Floats], covered: NDArray[np.bool_], colours: Sequence[Colour]
) -> Image.Image:
    """Draw the most probable class of each pixel, the more opaque the more probable it is.

    Args:
        means: Per class, (h, w).
        covered: (h, w), where there are tiles.
        colours: Per class.
    """
    best, most = np.zeros(covered.shape, np.int16), means[0].copy()
    # Class by class: all of them side by side would be large, and slow to go through.
    for number, mean in enumerate(means[1:], 1):
        np.copyto(best, number, where=mean > most)
        np.maximum(most, mean, out=most)
    layer = np.zeros((*covered.shape, 4), np.uint8)
    layer[..., :3] = np.asarray(colours, np.uint8)[best]
    layer[..., 3] = np.where(covered, np.rint(most * _OPAQUE), 0)
    return Image.fromarray(layer)


def heat_layer(mean: Floats, covered: NDArray[np.bool_]) -> Image.Image:
    """Draw the probability of one class."""
    level = np.clip(np.rint(mean * 255), 0, 255).astype(np.uint8)
    layer = np.zeros((*covered.shape, 4), np.uint8)
    layer[..., :3] = heat_table()[level]
    layer[..., 3] = np.where(covered, _OPAQUE, 0)
    return Image.fromarray(layer)


def overlay(
    overview: Pixels, layer: Image.Image, names: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """Lay the class layer over the slide, with a legend below."""
    picture = Image.fromarray(overview).convert("RGBA")
    picture.thumbnail((_SIDE, _SIDE))
    picture.alpha_composite(layer.resize(picture.size, Image.Resampling.NEAREST))
    line, width = 22, max(picture.width, 220)
    below = Image.new("RGB", (width, picture.height + line * len(names) + 8), "white")
    below.paste(picture.convert("RGB"), (0, 0))
    draw = ImageDraw.Draw(below)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        top = picture.height + 6 + number * line
        draw.rectangle((8, top, 24, top + 14), fill=colour)
        draw.text((32, top), name, fill="black", font_size=14)
    return below
