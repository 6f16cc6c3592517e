"""Where the tissue is: Otsu in saturation, a mask image, a GeoJSON annotation, or everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mambamic.errors import MambamicError, SlideError, UsageError
from mambamic.images import decode
from mambamic.slides.overview import Overview

Mask = NDArray[np.bool_]
_GEOJSON = (".geojson", ".json")
# Otsu halves whatever it is given. Of glass alone it would make tissue out of noise, and of tissue
# alone it would drop the pale half: paper and glass stay below 0.03, and nothing above 0.15 is.
_LOWEST, _HIGHEST = 8, 38  # of 255


@dataclass(frozen=True)
class Tissue:
    """A mask over the overview of a slide.

    Args:
        mask: (h, w), True where tissue is, or may be.
        how: ``otsu``, ``none``, or the name of the file.
        threshold: In saturation from 0 to 1, None where there is none.
    """

    mask: Mask
    how: str
    threshold: float | None = None

    @property
    def share(self) -> float:
        """Share of the slide that is tissue."""
        return float(self.mask.mean()) if self.mask.size else 0.0


def find_tissue(how: str, file: Path | None, overview: Overview) -> Tissue:
    """Make the mask of a slide.

    Args:
        how: ``otsu`` or ``none``; passed over where there is a file.
        file: A mask image (tissue is what is brighter than half), or GeoJSON in level-0 pixels.
        overview: Of the slide.

    Raises:
        UsageError: The file is neither, or not of this slide.
    """
    height, width = overview.pixels.shape[:2]
    if file is not None:
        drawn = file.suffix.lower() in _GEOJSON
        mask = _from_geojson(file, overview) if drawn else _from_image(file, (width, height))
        return Tissue(mask, file.name)
    if how == "none":
        return Tissue(np.ones((height, width), bool), "none")
    # Largest minus smallest channel. The saturation of HSV, which divides by the largest, is noise
    # in dark pixels, and all of a fluorescence slide's background is dark.
    saturation = np.ptp(overview.pixels, axis=2)
    threshold = int(np.clip(otsu(saturation[overview.known]), _LOWEST, _HIGHEST))
    # Where the overview could not be read there may be tissue: the tiles will tell.
    return Tissue((saturation > threshold) | ~overview.known, "otsu", threshold / 255)


def otsu(values: NDArray[np.uint8]) -> int:
    """Return the value that best parts 8-bit numbers into two groups (Otsu 1979)."""
    if values.size == 0:
        return 0
    share = np.bincount(values.ravel(), minlength=256) / values.size
    below = share.cumsum()
    mean = (share * np.arange(256)).cumsum()
    spread = below * (1 - below)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.where(spread > 1e-12, (mean[-1] * below - mean) ** 2 / spread, 0)
    return int(between.argmax())


def tissue_fractions(
    mask: Mask,
    corners: tuple[NDArray[np.int64], NDArray[np.int64]],
    size: int,
    slide: tuple[int, int],
) -> NDArray[np.float32]:
    """Return the share of tissue in each tile.

    Args:
        mask: (h, w), over the whole slide.
        corners: Left and top of N tiles, in level-0 pixels.
        size: Side of a tile, in level-0 pixels.
        slide: Width and height of level 0.
    """
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    sums[1:, 1:] = mask.cumsum(0).cumsum(1)

    def span(start: NDArray[np.int64], extent: int, cells: int) -> tuple[Any, Any]:
        first = np.clip(np.rint(start * (cells / extent)).astype(np.int64), 0, cells - 1)
        last = np.clip(np.rint((start + size) * (cells / extent)).astype(np.int64), 1, cells)
        return first, np.maximum(last, first + 1)

    left, right = span(corners[0], slide[0], mask.shape[1])
    top, bottom = span(corners[1], slide[1], mask.shape[0])
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    fractions: NDArray[np.float32] = (inside / ((right - left) * (bottom - top))).astype(np.float32)
    return fractions


def _from_image(file: Path, size: tuple[int, int]) -> Mask:
    try:
        image = decode(file.read_bytes()).convert("L")
    except (OSError, MambamicError) as error:
        what = error.problem if isinstance(error, MambamicError) else error
        raise UsageError(
            f"the mask {file} of --tissue ({what})", "an image", "check the path"
        ) from error
    ours, theirs = size[0] / size[1], image.width / image.height
    if not 0.95 < ours / theirs < 1.05:
        raise UsageError(
            f"the mask {file.name} of {image.width} x {image.height} pixels",
            f"the shape of the slide, {ours:.3f} to 1",
            "give the mask of this slide, over all of it",
        )
    return np.asarray(image.resize(size, Image.Resampling.BOX)) > 127


def _from_geojson(file: Path, overview: Overview) -> Mask:
    try:
        polygons = list(_polygons(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UsageError(
            f"the annotation {file} ({error or type(error).__name__})",
            "GeoJSON with polygons, as QuPath exports it",
            "export it again",
        ) from error
    height, width = overview.pixels.shape[:2]
    mask = np.zeros((height, width), bool)
    for outer, *holes in polygons:
        image = Image.new("1", (width, height))
        draw = ImageDraw.Draw(image)
        draw.polygon(overview.to_overview(outer), fill=1)
        for hole in holes:
            draw.polygon(overview.to_overview(hole), fill=0)
        mask |= np.asarray(image)
    return mask


def _polygons(shape: Any) -> Iterator[list[list[tuple[float, float]]]]:
    """Go through the polygons of any GeoJSON object; each is an outline and holes."""
    if isinstance(shape, list):
        for entry in shape:
            yield from _polygons(entry)
        return
    kind = shape["type"]
    if kind == "FeatureCollection":
        yield from _polygons(shape["features"])
    elif kind == "Feature":
        yield from _polygons(shape["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(shape["geometries"])
    elif kind in ("Polygon", "MultiPolygon"):
        shapes = [shape["coordinates"]] if kind == "Polygon" else shape["coordinates"]
        for rings in shapes:
            yield [_ring(ring) for ring in rings or [[]]]
    else:
        raise ValueError(f"a {kind}, which has no area")


def _ring(points: Any) -> list[tuple[float, float]]:
    ring = [(float(p[0]), float(p[1])) for p in points]
    if len(ring) < 3:
        raise ValueError(f"an outline of {len(ring)} points, which has no area")
    if not np.isfinite(ring).all():
        raise ValueError("a point that is not finite")
    return ring


def mask_for(folder_or_file: Path, slide: Path) -> Path:
    """Return the mask of a slide: the file itself, or that of its name in a folder.

    Raises:
        SlideError: The folder has none.
    """
    if not folder_or_file.is_dir():
        return folder_or_file
    for suffix in (*_GEOJSON, ".png", ".tif", ".tiff"):
        for name in (slide.stem, slide.name):
            if (folder_or_file / f"{name}{suffix}").is_file():
                return folder_or_file / f"{name}{suffix}"
    raise SlideError(
        f"no mask for {slide.name} in {folder_or_file}",
        f"{slide.stem}.geojson or {slide.stem}.png",
        "add it, or leave the slide out",
    )
