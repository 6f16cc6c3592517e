"""What it is worth to read the best level of a pyramid and not level 0.

    python -m benchmarks.slide_levels SLIDE --tiles 24

Tiles at 2, 4 and 8 times coarser than level 0 are read both ways in turn, in one process, from
files that the system has in memory, and brought to 224 pixels; the slide is opened anew each time,
so that no decoded block is left from the other way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write
from mambamic.preprocess import Preprocess
from mambamic.slides.grid import lay_out, positions
from mambamic.slides.read import Place, Source, TileReader
from mambamic.slides.source import open_slide

LOOK = Preprocess()
SIDE = 224


def milliseconds(path: Path, factor: float, level: int | None, tiles: int) -> float:
    """Return what a tile costs."""
    slide = open_slide(path)
    slide.close()
    layout = lay_out(slide.info, SIDE, SIDE, factor, level=level)
    x, y = positions(slide.info, layout)
    middle = max(0, len(x) // 2 - tiles // 2)
    corners = list(zip(x.tolist(), y.tolist(), strict=True))[middle : middle + tiles]
    places = [Place(at, *corner) for at, corner in enumerate(corners)]
    source = Source(path, False, layout.level, layout.read_size, LOOK)
    pixels = np.empty((len(places), SIDE, SIDE, 3), np.uint8)
    reader = TileReader()
    began = time.perf_counter()
    report = reader.read(source, places, pixels)
    took = time.perf_counter() - began
    reader.close()
    assert not report.failures
    return 1000 * took / len(places)


def compare(path: Path, factor: float, tiles: int, repeats: int) -> dict[str, Any]:
    """Return the medians of both ways, and how many times the best level is faster."""
    best, zero = [], []
    for _ in range(repeats):
        best.append(milliseconds(path, factor, None, tiles))
        zero.append(milliseconds(path, factor, 0, tiles))
    medians = {"best_level_ms": statistics.median(best), "level_0_ms": statistics.median(zero)}
    return {**medians, "times": medians["level_0_ms"] / medians["best_level_ms"]}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    factors = {f"{n}x": compare(args.slide, n, args.tiles, args.repeats) for n in (2, 4, 8)}
    write({"slide": args.slide.name, "tiles": args.tiles, **factors}, args.out)


if __name__ == "__main__":
    main()
