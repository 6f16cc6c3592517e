"""A small picture of a whole slide, read from its pyramid block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambamic.errors import SlideError
from mambamic.preprocess import Pixels
from mambamic.slides.source import Slide, SlideInfo, open_slide

Box = tuple[int, int, int, int]  # left, top, right, bottom
SIDE = 2048  # of the longer side, at most
_BLOCK = 2048  # of what is read at a time: bounds the memory, also where there is no pyramid
_SMALLEST = 128  # pixels of the picture: a block that fails is quartered down to this
_UNKNOWN = 200  # grey


@dataclass(frozen=True)
class Overview:
    """A picture of a slide.

    Args:
        pixels: (h, w, 3).
        known: (h, w), False where the slide could not be read; the picture is grey there.
        slide: Width and height of level 0.
        origin: Left and top of the slide's bounds, from which QuPath counts.
    """

    pixels: Pixels
    known: NDArray[np.bool_]
    slide: tuple[int, int]
    origin: tuple[int, int]

    def to_overview(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        """Bring points from QuPath's level-0 pixels to pixels of the picture."""
        across = self.pixels.shape[1] / self.slide[0]
        down = self.pixels.shape[0] / self.slide[1]
        left, top = self.origin
        return [((x + left) * across, (y + top) * down) for x, y in points]


def read_overview(path: Path, slide: Slide | None = None, side: int = SIDE) -> Overview:
    """Read a small picture of a slide, without its associated images.

    Args:
        path: Of the slide; it is opened again where a region cannot be read.
        slide: The slide, if it is open; it is closed.
        side: At most so many pixels on the longer side.

    Raises:
        SlideError: It cannot be opened, or nothing of it can be read.
    """
    slide = open_slide(path) if slide is None else slide
    try:
        info = slide.info
        width, height = info.sizes[0]
        scale = min(1.0, side / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        level = _level(info, 1 / scale)
        pixels = np.full((size[1], size[0], 3), _UNKNOWN, np.uint8)
        known = np.zeros((size[1], size[0]), bool)

        def draw(slide: Slide, box: Box) -> bool:
            left, top, right, bottom = box
            try:
                pixels[top:bottom, left:right] = _read_block(slide, level, scale, box)
            except SlideError:
                return False
            known[top:bottom, left:right] = True
            return True

        blocks = _blocks((0, 0, *size), max(1, int(_BLOCK * scale * info.downsamples[level])))
        with ThreadPoolExecutor(slide.threads) as threads:
            drawn = list(threads.map(partial(draw, slide), blocks))
        # One that fails takes along those that are read beside and after it: each is tried again.
        waiting = [box for box, done in zip(blocks, drawn, strict=True) if not done]
        fresh = False
        while waiting:
            if not fresh:
                # The old one is closed once, here or, where the file is gone, at the end.
                broken, slide = slide, open_slide(path)
                broken.close()
            box = waiting.pop()
            fresh = draw(slide, box)
            longer = max(box[2] - box[0], box[3] - box[1])
            # What can be read around the damage is read.
            if not fresh and longer > _SMALLEST:
                waiting += _blocks(box, longer // 2)
    finally:
        slide.close()
    if not known.any():
        raise SlideError(
            f"no part of {path.name} can be read",
            "pixels",
            "copy it again from where it was scanned",
        )
    return Overview(pixels, known, (width, height), info.bounds[:2])


def _level(info: SlideInfo, factor: float) -> int:
    fine = [n for n, d in enumerate(info.downsamples) if d <= factor * 1.01]
    return max(fine, key=lambda n: info.downsamples[n])


def _blocks(box: Box, step: int) -> list[Box]:
    return [
        (left, top, min(left + step, box[2]), min(top + step, box[3]))
        for top in range(box[1], box[3], step)
        for left in range(box[0], box[2], step)
    ]


def _read_block(slide: Slide, level: int, scale: float, box: Box) -> Pixels:
    left, top, right, bottom = box
    downsample = slide.info.downsamples[level]
    # Regions begin at whole pixels; the picture's need not. A region that begins between pixels of
    # its level is interpolated by OpenSlide, which blurs, and takes longer than to decode it.
    corner = _on_level(left / scale, downsample), _on_level(top / scale, downsample)
    start = (left / scale - corner[0]) / downsample, (top / scale - corner[1]) / downsample
    end = (
        start[0] + (right - left) / scale / downsample,
        start[1] + (bottom - top) / scale / downsample,
    )
    image = slide.read(*corner, level, (math.ceil(end[0]), math.ceil(end[1])))
    small = image.resize((right - left, bottom - top), box=(*start, *end), reducing_gap=2.0)
    return np.asarray(small)


def _on_level(place: float, downsample: float) -> int:
    """Return the level-0 pixel, not beyond a place, at which a pixel of a level begins."""
    return int(int(place / downsample) * downsample)
