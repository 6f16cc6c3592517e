"""Heat maps: what the tiles of a slide say, laid over its overview."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._shape = shape
        across, down = shape[1] / slide[0], shape[0] / slide[1]
        self._left = np.rint(x * across).astype(np.int64)
        self._right = np.maximum(np.rint((x + size) * across).astype(np.int64), self._left + 1)
        self._top = np.rint(y * down).astype(np.int64)
        self._bottom = np.maximum(np.rint((y + size) * down).astype(np.int64), self._top + 1)
        self.count = self._sum(np.ones(len(x)))

    def mean(self, values: Floats) -> Floats:
        """Return (h, w): the mean of a value over the tiles at each pixel, 0 where none is."""
        mean: Floats = (self._sum(values) / np.maximum(self.count, 1)).astype(np.float32)
        return mean

    def _sum(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        # Each tile as four corners, then running sums: the cost does not grow with their size.
        corners = np.zeros((self._shape[0] + 2, self._shape[1] + 2))
        for row, column, sign in (
            (self._top, self._left, 1),
            (self._top, self._right, -1),
            (self._bottom, self._left, -1),
            (self._bottom, self._right, 1),
        ):
            inside = np.minimum(row, self._shape[0]), np.minimum(column, self._shape[1])
            np.add.at(corners, inside, sign * values)
        total: NDArray[np.float64] = corners.cumsum(0).cumsum(1)[: self._shape[0], : self._shape[1]]
        return np.rint(total * 2**20) / 2**20  # what is left of rounding where nothing lies


def class_layer(
    means: Sequence[Floats], covered: NDArray[np.bool_], colours: Sequence[Colour]
) -> Image.Image:
    """Draw the most probable class of each pixel, the more opaque the more probable it is.

    Args:
        means: Per class, (h, w).
        covered: (h, w), where there are tiles.
        colours: Per class.
    """
    stacked = np.stack(means)
    best = stacked.argmax(axis=0)
    layer = np.zeros((*covered.shape, 4), np.uint8)
    layer[..., :3] = np.asarray(colours, np.uint8)[best]
    layer[..., 3] = np.where(covered, np.rint(stacked.max(axis=0) * _OPAQUE), 0)
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
