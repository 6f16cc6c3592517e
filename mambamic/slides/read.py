"""Reading tiles: one region of one slide after the other, and what becomes of those that fail."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mambamic.errors import MambamicError, SlideError
from mambamic.preprocess import Pixels, Preprocess
from mambamic.slides.source import Slide, open_slide
from mambamic.slides.tileset import TileSet

OK, UNREADABLE, DIED = "ok", "unreadable", "reader_died"
_KEPT_OPEN = 2  # the slide that is read, and the next


@dataclass(frozen=True)
class Source:
    """Where tiles come from, and what is made of them.

    Args:
        path: The slide, or the set of tiles.
        tiles_are_files: Whether it is a set of tiles.
        level: The pyramid level that is read.
        read_size: Side of a tile in pixels of that level.
        preprocess: What brings a tile to the model's input.
        encode: Give PNG files of that, for a server, instead of pixels.
    """

    path: Path
    tiles_are_files: bool
    level: int
    read_size: int
    preprocess: Preprocess
    encode: bool = False


class Place(NamedTuple):
    """A tile that is to be read.

    Args:
        at: Its place in the batch.
        x: Left, in level-0 pixels.
        y: Top, in level-0 pixels.
        name: Of the image, in a set of tiles: files come and go, and numbers would then shift.
    """

    at: int
    x: int
    y: int
    name: str | None = None


class Failure(NamedTuple):
    """A tile that could not be read: its place in the batch, a word for it, and why."""

    at: int
    status: str
    message: str


@dataclass
class Report:
    """What became of some tiles.

    Args:
        failures: Those that could not be read; all others were.
        files: PNG files of those that could, where such were asked for.
        read_s: Seconds that reading and decoding took.
        preprocess_s: Seconds that resizing, or writing PNG, took.
    """

    failures: list[Failure] = field(default_factory=list)
    files: dict[int, bytes] = field(default_factory=dict)
    read_s: float = 0.0
    preprocess_s: float = 0.0


class TileReader:
    """Reads tiles of any number of slides, and keeps the last ones open. Not safe in threads."""

    def __init__(self) -> None:
        self._open: dict[Path, Slide | TileSet] = {}

    def read(self, source: Source, places: Sequence[Place], pixels: Pixels | None) -> Report:
        """Read tiles; one that fails is reported, and does not keep the others from being read.

        Args:
            source: The slide.
            places: The tiles.
            pixels: (B, S, S, 3), to which tiles are written at their place; None for PNG files.
        """
        report = Report()
        for place in places:
            began = time.perf_counter()
            try:
                tile = self._tile(source, place)
            except MambamicError as error:
                report.failures.append(Failure(place.at, UNREADABLE, error.problem))
                report.read_s += time.perf_counter() - began
                continue
            read = time.perf_counter()
            seen = source.preprocess.pixels(tile)
            if pixels is None:
                report.files[place.at] = _png(seen)
            else:
                pixels[place.at] = seen
            report.read_s += read - began
            report.preprocess_s += time.perf_counter() - read
        return report

    def _tile(self, source: Source, place: Place) -> Image.Image:
        if source.tiles_are_files:
            tiles = self._opened(source)
            assert isinstance(tiles, TileSet)
            assert place.name is not None
            return tiles.read(place.name)
        size = (source.read_size, source.read_size)
        try:
            return self._slide(source).read(place.x, place.y, source.level, size)
        except SlideError:
            # After one bad region OpenSlide refuses all others too. A fresh handle tells whether
            # it is this one, and a network's hiccup is over by then.
            self._drop(source.path)
            try:
                return self._slide(source).read(place.x, place.y, source.level, size)
            except SlideError:
                self._drop(source.path)
                raise

    def _slide(self, source: Source) -> Slide:
        slide = self._opened(source)
        assert not isinstance(slide, TileSet)
        return slide

    def _opened(self, source: Source) -> Slide | TileSet:
        if source.path not in self._open:
            while len(self._open) >= _KEPT_OPEN:
                self._drop(next(iter(self._open)))
            opener = TileSet if source.tiles_are_files else open_slide
            self._open[source.path] = opener(source.path)
        return self._open[source.path]

    def _drop(self, path: Path) -> None:
        if path in self._open:
            self._open.pop(path).close()

    def close(self) -> None:
        """Close all slides."""
        for path in list(self._open):
            self._drop(path)


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    # The level costs time and does not change the pixels.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def as_pixels(buffer: memoryview | bytearray, count: int, size: int) -> Pixels:
    """Look at memory as ``count`` square images."""
    return np.frombuffer(buffer, np.uint8, count * size * size * 3).reshape(count, size, size, 3)
