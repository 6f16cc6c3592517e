"""Tiles as objects that QuPath opens: GeoJSON in the schema of its own export.

Source: https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html and
``QuPathTypeAdapters`` of QuPath 0.4 and later: ``objectType``, ``classification`` with ``name`` and
``color``, ``measurements`` as an object. QuPath shows a slide that has bounds within these, and
counts pixels from their corner; so do these files.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mambamic.slides.colours import Colour
from mambamic.slides.files import fresh
from mambamic.slides.table import PREFIX

GEOJSON = "tiles.geojson"
_HERE = "\0"  # where a value goes; no class has this name


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
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, key)
    templates = {
        name: _template(name, colour, classes)
        for name, colour in zip(classes, colours, strict=True)
    }
    count = 0
    with fresh(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for table in tables:
            good = table.filter(pc.equal(table["status"], "ok"))
            for feature in _features(good, namespace, classes, templates, origin):
                file.write((",\n" if count else "\n") + feature)
                count += 1
        file.write("\n]}\n")
    return count


def _template(label: str, colour: Colour, classes: Sequence[str]) -> str:
    """Return a tile of a class as JSON, with places for its id, corners and measurements."""
    names = [*classes, "tissue fraction"]
    feature = {
        "type": "Feature",
        "id": _HERE,
        "geometry": {"type": "Polygon", "coordinates": [[[_HERE, _HERE]] * 5]},
        "properties": {
            "objectType": "tile",
            "classification": {"name": label, "color": list(colour)},
            "measurements": dict.fromkeys(names, _HERE),
        },
    }
    text = json.dumps(feature, ensure_ascii=False).replace("%", "%%")
    return text.replace(json.dumps(_HERE), "%s")


def _features(
    table: pa.Table,
    namespace: uuid.UUID,
    classes: Sequence[str],
    templates: dict[str, str],
    origin: tuple[int, int],
) -> Iterator[str]:
    """Give tiles as JSON; made from columns, not from rows as objects, which takes far longer."""
    left, top = (table[axis].to_numpy() - start for axis, start in zip("xy", origin, strict=True))
    right, bottom = left + table["w"].to_numpy(), top + table["h"].to_numpy()
    corners = (left, top, right, top, right, bottom, left, bottom, left, top)
    measured = {name: _numbers(table[PREFIX + name], 6) for name in classes}
    measured["tissue fraction"] = _numbers(table["tissue_fraction"], 4)
    rows = zip(
        table["top_class"].to_pylist(),
        [f'"{_id(namespace, tile)}"' for tile in table["tile"].to_pylist()],
        *(corner.tolist() for corner in corners),
        *measured.values(),
        strict=True,
    )
    for label, *row in rows:
        yield templates[label] % tuple(row)


def _id(namespace: uuid.UUID, tile: int) -> str:
    """Return ``str(uuid.uuid5(namespace, str(tile)))`` without the object, which costs more."""
    text = hashlib.sha1(namespace.bytes + b"%d" % tile, usedforsecurity=False).hexdigest()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant}{text[17:20]}-{text[20:32]}"


def _numbers(column: pa.ChunkedArray, digits: int) -> list[str]:
    """Write numbers from 0 to 1 with so many digits, as JSON's that stay floating-point ones."""
    texts = [f"{value:.{digits}g}" for value in column.to_pylist()]
    return [text if "." in text or "e" in text else text + ".0" for text in texts]
