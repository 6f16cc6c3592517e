"""Tiles as objects that QuPath opens: GeoJSON in the schema of its own export.

Source: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html and
``QuPathTypeAdapters`` of QuPath 0.4 and later: ``objectType``, ``classification`` with ``name`` and
``color``, ``measurements`` as an object. QuPath shows a slide that has bounds within these, and
counts pixels from their corner; so do these files.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mambamic.slides.colours import Colour
from mambamic.slides.files import fresh
from mambamic.slides.table import PREFIX

GEOJSON = "tiles.geojson"


def write_geojson(
    path: Path,
    tables: Iterable[pa.Table],
    key: str,
    classes: Sequence[str],
    colours: Sequence[Colour],
    origin: tuple[int, int],
) -> int:
    """Write the tiles that have scores, and return how many.

    Args:
        path: The file.
        tables: The parts of the slide's table.
        key: Of the slide's work; the objects' ids follow from it, so a second run gives the same.
        classes: Names, in order.
        colours: Per class.
        origin: Left and top of the slide's bounds, in level-0 pixels.
    """
    shown = dict(zip(classes, colours, strict=True))
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, key)
    count = 0
    with fresh(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for table in tables:
            for row in table.to_pylist():
                if row["status"] != "ok":
                    continue
                feature = _feature(row, namespace, classes, shown, origin)
                file.write((",\n" if count else "\n") + json.dumps(feature, ensure_ascii=False))
                count += 1
        file.write("\n]}\n")
    return count


def _feature(
    row: dict[str, Any],
    namespace: uuid.UUID,
    classes: Sequence[str],
    colours: dict[str, Colour],
    origin: tuple[int, int],
) -> dict[str, Any]:
    left, top = row["x"] - origin[0], row["y"] - origin[1]
    right, bottom = left + row["w"], top + row["h"]
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    label = row["top_class"]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(namespace, str(row["tile"]))),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "tile",
            "classification": {"name": label, "color": list(colours[label])},
            "measurements": {
                **{name: float(f"{row[PREFIX + name]:.6g}") for name in classes},
                "tissue fraction": float(f"{row['tissue_fraction']:.4g}"),
            },
        },
    }
