"""The plan of a slide: every tile that will be scored, written down before the first is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from mambamic.slides.files import JOB, fresh, read_json, sweep, write_json
from mambamic.slides.grid import positions
from mambamic.slides.inspection import Inspection
from mambamic.slides.overview import Overview, read_overview
from mambamic.slides.read import Place
from mambamic.slides.settings import PART, ModelFacts, Settings
from mambamic.slides.tileset import TileSet
from mambamic.slides.tissue import Tissue, find_tissue, tissue_fractions

PLAN, OVERVIEW, TISSUE = "plan.parquet", "overview.jpg", "tissue.png"


@dataclass(frozen=True)
class Plan:
    """The tiles of a slide, in the order of the table.

    Args:
        x: (N,) left, in level-0 pixels; 0 in a set of tiles.
        y: (N,) top, likewise.
        tissue: (N,) share of tissue.
        names: (N,) of the images of a set of tiles, None for a slide.
    """

    x: NDArray[np.int64]
    y: NDArray[np.int64]
    tissue: NDArray[np.float32]
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def parts(self) -> int:
        """Number of files of the table."""
        return -(-len(self.x) // PART)

    def part(self, number: int) -> slice:
        """Return the tiles of a part."""
        return slice(number * PART, min((number + 1) * PART, len(self.x)))

    def places(self, tiles: Iterable[int]) -> list[Place]:
        """Return where some tiles are read, numbered from 0."""
        return [
            Place(at, int(self.x[n]), int(self.y[n]), self.names[n] if self.names else None)
            for at, n in enumerate(tiles)
        ]


@dataclass(frozen=True)
class Planned:
    """A plan, and what a person wants to know of how it came about."""

    plan: Plan
    facts: dict[str, Any]
    overview: Overview | None
    tissue: Tissue | None


def make_plan(seen: Inspection, settings: Settings) -> Planned:
    """Find the tissue of a slide and choose its tiles.

    Raises:
        SlideError: It cannot be read.
        UsageError: Its mask cannot be read, or is of another slide.
    """
    if seen.info is None or seen.layout is None:
        tiles = TileSet(seen.given.path)
        names = tiles.names()
        tiles.close()
        count = len(names)
        nowhere = np.zeros(count, np.int64)
        plan = Plan(nowhere, nowhere, np.ones(count, np.float32), names)
        return Planned(plan, {"tiles_in_grid": count, "tiles": count}, None, None)
    overview = read_overview(seen.given.path)
    tissue = find_tissue(settings.tissue, seen.mask, overview)
    x, y = positions(seen.info, seen.layout)
    share = tissue_fractions(tissue.mask, (x, y), seen.layout.size, seen.info.sizes[0])
    # Without a mask nothing is left out, whatever share is asked for.
    kept = share >= settings.min_tissue if tissue.how != "none" else np.ones(len(x), bool)
    plan = Plan(x[kept], y[kept], share[kept])
    facts = {
        "tiles_in_grid": len(x),
        "tiles": len(plan),
        "tissue_by": tissue.how,
        "tissue_share": round(tissue.share, 6),
        "tissue_threshold": tissue.threshold,
        "overview_unreadable": round(1 - float(overview.known.mean()), 6),
    }
    if not len(plan):
        facts["why_none"] = _why_none(seen, settings, tissue, len(x))
    return Planned(plan, facts, overview, tissue)


def _why_none(seen: Inspection, settings: Settings, tissue: Tissue, in_grid: int) -> str:
    assert seen.info is not None
    assert seen.layout is not None
    width, height = seen.info.bounds[2:]
    if not in_grid:
        return (
            f"a tile is {seen.layout.size} pixels of level 0 wide, and the slide has only "
            f"{width} x {height}: choose a smaller --tile, or --tiles where images are tiles"
        )
    by = tissue.how
    if tissue.threshold is not None:
        by = f"Otsu's threshold of {tissue.threshold:.3f} in saturation"
    return (
        f"{by} leaves {tissue.share:.2%} of the slide as tissue (see {TISSUE}), and none of "
        f"{in_grid} tiles has {settings.min_tissue:.0%} of it: look at the mask, then lower "
        "--min-tissue, or give --tissue none or a mask"
    )


def write_plan(folder: Path, seen: Inspection, planned: Planned, model: ModelFacts) -> None:
    """Write a plan into the slide's folder; the job's file is last and says that all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = planned.plan
    columns: dict[str, Any] = {"x": plan.x, "y": plan.y, "tissue_fraction": plan.tissue}
    if plan.names is not None:
        columns["name"] = plan.names
    with fresh(folder / PLAN) as path:
        pq.write_table(pa.table(columns), path)
    if planned.overview is not None and planned.tissue is not None:
        with fresh(folder / OVERVIEW) as path:
            Image.fromarray(planned.overview.pixels).save(path, "JPEG", quality=92)
        with fresh(folder / TISSUE) as path:
            Image.fromarray(planned.tissue.mask).save(path, "PNG")
    write_json(folder / JOB, _job(seen, planned, model))


def _job(seen: Inspection, planned: Planned, model: ModelFacts) -> dict[str, Any]:
    return {
        "key": seen.key,
        "slide": seen.given.name,
        "path": str(seen.given.path),
        "tiles_are_files": seen.info is None,
        "header": None if seen.info is None else asdict(seen.info),
        "resolution": asdict(seen.resolution),
        "layout": None if seen.layout is None else asdict(seen.layout),
        "plan": planned.facts,
        "notes": seen.notes,
        "model": {
            "kind": model.kind,
            "name": model.name,
            "identity": model.identity,
            "classes": list(model.classes),
            "head": model.head,
        },
    }


def read_plan(folder: Path, key: str) -> Plan | None:
    """Return the plan that lies in a slide's folder, None where there is none of this key."""
    job = read_json(folder / JOB)
    if job is None or job["key"] != key:
        return None
    sweep(folder)
    with pq.ParquetFile(folder / PLAN) as file:
        table = file.read()
    named = "name" in table.column_names
    return Plan(
        table["x"].to_numpy(),
        table["y"].to_numpy(),
        table["tissue_fraction"].to_numpy(),
        table["name"].to_pylist() if named else None,
    )
