"""``--dry-run``: what would be scored, without a model being loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from mambamic.errors import MambamicError
from mambamic.slides.inspection import Inspection, Refusal
from mambamic.slides.plan import Plan, make_plan
from mambamic.slides.read import Source, TileReader
from mambamic.slides.settings import ModelFacts, Settings

_SAMPLE = 24  # tiles that are read to tell how long all will take
_HEAD = (
    "slide",
    "format",
    "µm/pixel",
    "from",
    "level",
    "read",
    "tissue",
    "tiles",
    "to read, 1 core",
)


def plan_lines(
    slides: Sequence[Inspection | Refusal], settings: Settings, model: ModelFacts
) -> tuple[list[str], bool]:
    """Return a line per slide and what is to be said of it, and whether all can be scored."""
    with ThreadPoolExecutor(2, "plan") as threads:
        planned = threads.map(lambda seen: _row(seen, settings, model), slides)
        # None: no bar where standard error is not a terminal.
        rows = list(tqdm(planned, total=len(slides), unit="slide", delay=2, disable=None))
    table = [_HEAD, *(row for row, _, _ in rows)]
    widths = [max(len(row[n]) for row in table) for n in range(len(_HEAD))]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines.append(f"{sum(tiles for _, tiles, _ in rows)} tiles of {len(rows)} slides")
    lines += [f"{row[0]}: {note}" for row, _, notes in rows for note in notes]
    return lines, all(row[1] != "failed" for row, _, _ in rows)


def _row(
    seen: Inspection | Refusal, settings: Settings, model: ModelFacts
) -> tuple[tuple[str, ...], int, list[str]]:
    """Return cells, number of tiles, and what is to be said below the table."""
    if isinstance(seen, Refusal):
        return _failed(seen.given.name, seen.error)
    try:
        planned = make_plan(seen, settings)
        each = _seconds_per_tile(seen, planned.plan, model)
    except MambamicError as error:
        return _failed(seen.given.name, error)
    count = len(planned.plan)
    layout, info = seen.layout, seen.info
    notes = list(seen.notes)
    if "why_none" in planned.facts:
        notes.append(planned.facts["why_none"])
    mpp = seen.resolution.mpp
    cells = (
        seen.given.name,
        "tiles" if info is None else info.format,
        "-" if mpp is None else f"{mpp:.4g}",
        seen.resolution.source,
        "-" if layout is None else str(layout.level),
        "-" if layout is None else f"{layout.read_size} px",
        "-" if planned.tissue is None else f"{planned.tissue.share:.1%}",
        f"{count} of {planned.facts['tiles_in_grid']}",
        "-" if each is None else _duration(each * count),
    )
    return cells, count, notes


def _failed(name: str, error: MambamicError) -> tuple[tuple[str, ...], int, list[str]]:
    return (name, "failed", *("-" for _ in _HEAD[2:])), 0, [str(error)]


def _seconds_per_tile(seen: Inspection, plan: Plan, model: ModelFacts) -> float | None:
    """Read some tiles from all over the slide and return what one costs."""
    if not len(plan):
        return None
    layout = seen.layout
    source = Source(
        path=seen.given.path,
        tiles_are_files=layout is None,
        level=0 if layout is None else layout.level,
        read_size=0 if layout is None else layout.read_size,
        preprocess=model.preprocess,
    )
    # Runs of tiles that lie side by side, as they will be read.
    starts = np.linspace(0, max(0, len(plan) - 8), _SAMPLE // 8).astype(int)
    chosen = sorted({n for start in starts for n in range(start, min(start + 8, len(plan)))})
    places = plan.places(chosen)
    size = source.preprocess.input_size
    pixels = np.empty((len(places), size, size, 3), np.uint8)
    reader = TileReader()
    began = time.perf_counter()
    reader.read(source, places, pixels)
    took = time.perf_counter() - began
    reader.close()
    return took / len(places)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
