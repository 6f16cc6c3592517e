"""The last step of a slide: maps, objects, page and summary, made from its table.

It runs in a process of its own (``python -m mambamic.slides.finish``), so that the model does not
wait for it, and needs only what lies in the slide's folder, and the slide for the page's gallery.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mambamic.slides.colours import class_colours
from mambamic.slides.files import JOB, fresh, read_json, write_json
from mambamic.slides.geojson import GEOJSON, write_geojson
from mambamic.slides.maps import TileMap, class_layer, overlay
from mambamic.slides.plan import OVERVIEW, Plan, read_plan
from mambamic.slides.report import Pictures, Shown, write_page
from mambamic.slides.summary import SUMMARY, Tally, verdict
from mambamic.slides.table import CSV, PREFIX, TABLE, read_parts, write_csv

HEAT, OVERLAY, PAGE = "heatmap.png", "overlay.png", "report.html"


@dataclass(frozen=True)
class Finish:
    """What is to be made of a table.

    Args:
        max_bad: Largest share of tiles without scores.
        csv: Whether to write the table as CSV too.
        geojson: Whether to write objects for QuPath.
        run: How it was run, for the page.
    """

    max_bad: float
    csv: bool
    geojson: bool
    run: dict[str, Any]

    def is_done(self, summary: dict[str, Any] | None) -> bool:
        """Tell whether a summary says that all of this is there."""
        if summary is None:
            return False
        asked = {"csv": self.csv, "geojson": self.geojson}
        there = summary["finish"]
        more = all(there[name] or not wanted for name, wanted in asked.items())
        return more and bool(there["max_bad"] == self.max_bad)


def finish(folder: Path, how: Finish) -> dict[str, Any]:
    """Make everything of a slide whose table is complete, and return its summary.

    Args:
        folder: Of the slide.
        how: What is to be made.
    """
    job = read_json(folder / JOB)
    plan = read_plan(folder, job["key"])
    assert plan is not None
    classes = job["model"]["classes"]
    tally = Tally(classes)
    scores = np.full((len(plan), len(classes)), np.nan, np.float32)
    for number, table in enumerate(read_parts(folder, plan.parts)):
        tally.add(table)
        for place, name in enumerate(classes):
            column = table[PREFIX + name]
            scores[plan.part(number), place] = column.to_numpy(zero_copy_only=False)
    status, reason = verdict(tally, how.max_bad, job["plan"].get("why_none"))
    outputs = [TABLE] if plan.parts else []
    if how.csv and plan.parts:
        write_csv(folder, plan.parts)
        outputs.append(CSV)
    shown = Shown(job, {}, plan, scores)
    if not job["tiles_are_files"] and tally.good:
        outputs += _pictures(folder, job, plan, shown, how)
    summary = {
        "slide": job["slide"],
        "path": job["path"],
        "key": job["key"],
        "status": status,
        "reason": reason,
        **tally.as_json(),
        "resolution": job["resolution"],
        "layout": job["layout"],
        "plan": job["plan"],
        "notes": job["notes"],
        "model": job["model"],
        "finish": {key: value for key, value in asdict(how).items() if key != "run"},
        "outputs": [*outputs, PAGE],
    }
    shown.summary = summary
    write_page(folder / PAGE, folder, shown, how.run)
    # Last: it says that all the others are there.
    write_json(folder / SUMMARY, summary)
    return summary


def _pictures(
    folder: Path, job: dict[str, Any], plan: Plan, shown: Shown, how: Finish
) -> list[str]:
    classes = job["model"]["classes"]
    colours = class_colours(len(classes))
    header = job["header"]
    scores = shown.scores
    good = ~np.isnan(scores[:, 0])
    with Image.open(folder / OVERVIEW) as picture:
        overview = np.asarray(picture.convert("RGB"))
    slide = tuple(header["sizes"][0])
    tiles = TileMap(plan.x[good], plan.y[good], job["layout"]["size"], slide, overview.shape[:2])
    means = [tiles.mean(scores[good, n]) for n in range(len(classes))]
    covered = tiles.count > 0
    layer = class_layer(means, covered, colours)
    shown.pictures = Pictures(overview, covered, means, layer)
    with fresh(folder / HEAT) as path:
        layer.save(path, "PNG")
    with fresh(folder / OVERLAY) as path:
        overlay(overview, layer, classes, colours).save(path, "PNG")
    outputs = [HEAT, OVERLAY]
    if how.geojson:
        tables = read_parts(folder, plan.parts)
        origin = (header["bounds"][0], header["bounds"][1])
        write_geojson(folder / GEOJSON, tables, job["key"], classes, colours, origin)
        outputs.append(GEOJSON)
    return outputs


if __name__ == "__main__":
    finish(Path(sys.argv[1]), Finish(**json.loads(sys.stdin.read())))
