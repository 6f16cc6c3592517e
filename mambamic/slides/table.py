"""The table of a slide: a folder of Parquet files, one per part, each there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mambamic.slides.files import fresh
from mambamic.slides.pipeline import PartScores

TABLE, CSV = "tiles.parquet", "tiles.csv"
PREFIX, EMBEDDING = "probability_", "embedding"


@dataclass(frozen=True)
class Geometry:
    """What is the same for all tiles of a slide.

    Args:
        slide: Its name.
        size: Side of a tile in level-0 pixels, None in a set of tiles.
        level: Which was read.
        mpp: Microns per pixel of that level, None where unknown.
    """

    slide: str
    size: int | None
    level: int
    mpp: float | None


def part_path(folder: Path, number: int) -> Path:
    """Return the file of a part."""
    return folder / TABLE / f"part-{number:06}.parquet"


def write_part(
    folder: Path,
    result: PartScores,
    geometry: Geometry,
    classes: Sequence[str],
    run: Any,
    *,
    embeddings: bool,
) -> None:
    """Write a part of the table, whole or not at all.

    Args:
        folder: Of the slide.
        result: The scores.
        geometry: Of its tiles.
        classes: Names, in the order of the scores.
        run: What scored it, as JSON; kept in the file's metadata.
        embeddings: Whether they have a column.
    """
    path = part_path(folder, result.part.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"mambamic": json.dumps(run)}
    table = part_table(result, geometry, classes, embeddings=embeddings)
    table = table.replace_schema_metadata(metadata)
    with fresh(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def part_table(
    result: PartScores, geometry: Geometry, classes: Sequence[str], *, embeddings: bool
) -> pa.Table:
    """Return a part as a table; tiles without scores have nulls, and the columns do not differ."""
    plan = result.part.plan
    rows = plan.part(result.part.number)
    count = rows.stop - rows.start
    bad = np.array([status != "ok" for status in result.status])
    best = _best(result)
    columns: dict[str, Any] = {
        "slide": pa.array([geometry.slide] * count),
        "tile": pa.array(np.arange(rows.start, rows.stop, dtype=np.int64)),
    }
    if plan.names is not None:
        columns["name"] = pa.array(plan.names[rows])
    placed = None if plan.names is None else np.ones(count, bool)
    size = np.full(count, geometry.size or 0, np.int32)
    columns |= {
        "x": pa.array(plan.x[rows], mask=placed),
        "y": pa.array(plan.y[rows], mask=placed),
        "w": pa.array(size, mask=placed),
        "h": pa.array(size, mask=placed),
        "level": pa.array(np.full(count, geometry.level, np.int16), mask=placed),
        "mpp": pa.array([geometry.mpp] * count, pa.float64()),
        "tissue_fraction": pa.array(plan.tissue[rows], mask=placed),
    }
    for number, name in enumerate(classes):
        columns[PREFIX + name] = pa.array(result.probabilities[:, number], mask=bad)
    labels = [None if wrong else classes[n] for wrong, n in zip(bad, best, strict=True)]
    columns["top_class"] = pa.array(labels, pa.string())
    columns["status"] = pa.array(result.status)
    columns["message"] = pa.array([result.messages.get(n) for n in range(count)], pa.string())
    if embeddings:
        columns[EMBEDDING] = _lists(result.embeddings, bad)
    return pa.table(columns)


def _best(result: PartScores) -> list[int]:
    best: list[int] = np.nan_to_num(result.probabilities, nan=-1.0).argmax(axis=1).tolist()
    return best


def _lists(rows: NDArray[np.float32] | None, bad: NDArray[np.bool_]) -> pa.Array:
    """Return (N, C) as N lists of no fixed length: without any good tile none is known."""
    kept = np.zeros((0, 0), np.float32) if rows is None else rows[~bad]
    ends = np.cumsum(np.where(bad, 0, kept.shape[1]), dtype=np.int32)
    offsets = np.concatenate([np.zeros(1, np.int32), ends])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(kept.ravel()), mask=pa.array(bad))


def read_parts(folder: Path, parts: int) -> Iterator[pa.Table]:
    """Read the parts of a table one after the other, in their order and without embeddings."""
    for number in range(parts):
        # Not ``read_table``, which makes a data set of each file first, and takes twice as long.
        with pq.ParquetFile(part_path(folder, number)) as file:
            yield file.read([name for name in file.schema_arrow.names if name != EMBEDDING])


def written(folder: Path, parts: int) -> set[int]:
    """Return the numbers of the parts that are there."""
    return {number for number in range(parts) if part_path(folder, number).exists()}


def write_csv(folder: Path, parts: int) -> None:
    """Write the table as CSV too, without embeddings."""
    with fresh(folder / CSV) as temporary:
        writer = None
        for table in read_parts(folder, parts):
            if writer is None:
                writer = pc.CSVWriter(temporary, table.schema)
            writer.write_table(table)
        if writer is None:
            temporary.write_text("")
        else:
            writer.close()
