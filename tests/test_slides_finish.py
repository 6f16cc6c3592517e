"""What is made of a table: maps, objects for QuPath, verdicts and pages."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mambamic.preprocess import Preprocess
from mambamic.slides.claims import claim
from mambamic.slides.colours import class_colours, heat_table
from mambamic.slides.files import fresh, read_json, sweep, write_json
from mambamic.slides.geojson import write_geojson
from mambamic.slides.maps import TileMap, class_layer, heat_layer, overlay
from mambamic.slides.pipeline import Part, PartScores
from mambamic.slides.plan import Plan
from mambamic.slides.read import Failure, Source
from mambamic.slides.scorers import Scored
from mambamic.slides.summary import Tally, verdict
from mambamic.slides.table import Geometry, part_table

CLASSES = ("tumour", "stroma")


def _table(scores: list[list[float]], bad: tuple[int, ...] = ()) -> pa.Table:
    count = len(scores)
    x = np.arange(count, dtype=np.int64) * 100 + 50
    plan = Plan(x, np.full(count, 20), np.full(count, 0.5, np.float32))
    part = Part(Source(Path("s.svs"), False, 1, 50, Preprocess()), plan, 0)
    blank = np.full((count, 2), np.nan, np.float32)
    result = PartScores(part, blank, status=["ok"] * count)
    good = [n for n in range(count) if n not in bad]
    if good:
        probabilities = np.array([scores[n] for n in good], np.float32)
        result.add(good, Scored(probabilities, probabilities * 2))
    for n in bad:
        result.fail(Failure(n, "unreadable", "no pixels"))
    return part_table(result, Geometry("s.svs", 100, 1, 0.5), CLASSES, embeddings=True)


def test_objects_are_in_the_schema_that_qupath_documents(tmp_path: Path) -> None:
    """A FeatureCollection of Features with objectType, classification and measurements."""
    file = tmp_path / "t.geojson"
    tables = [_table([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], bad=(2,))]
    colours = class_colours(2)
    assert write_geojson(file, tables, "key", CLASSES, colours, (50, 20)) == 2
    collection = json.loads(file.read_text())
    assert collection["type"] == "FeatureCollection"
    first, second = collection["features"]
    for feature in (first, second):
        assert set(feature) == {"type", "id", "geometry", "properties"}
        assert feature["type"] == "Feature"
        assert uuid.UUID(feature["id"])
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert len(ring) == 5
        assert feature["properties"]["objectType"] == "tile"
        measured = feature["properties"]["measurements"]
        assert all(isinstance(value, float) for value in measured.values())
    assert first["geometry"]["coordinates"][0][0] == [0, 0], "from the corner of the bounds"
    assert second["geometry"]["coordinates"][0][2] == [200, 100]
    assert first["properties"]["classification"] == {"name": "tumour", "color": list(colours[0])}
    assert second["properties"]["measurements"]["stroma"] == pytest.approx(0.8)
    write_geojson(tmp_path / "again.geojson", tables, "key", CLASSES, colours, (50, 20))
    assert (tmp_path / "again.geojson").read_bytes() == file.read_bytes()


def test_an_object_is_what_json_makes_of_its_row(tmp_path: Path) -> None:
    """Ids are those of ``uuid``, and numbers those of Python, also at the ends of their range."""
    names = ('100 % "odd"', "tissue fraction")
    rows = [[1.0, 0.0], [1e-7, 0.9999999], [0.1234565, 1e-40], [0.00012345678, 1 / 3]]
    scores = np.array(rows, np.float32)
    columns = {f"probability_{name}": pa.array(scores[:, n]) for n, name in enumerate(names)}
    table = pa.table(
        {
            "tile": pa.array([0, 7, 512, 78960]),
            **{axis: pa.array([30, 40, 50, 60]) for axis in "xywh"},
            "tissue_fraction": pa.array([1, 0, 0.33333, 0.00001], pa.float32()),
            **columns,
            "top_class": pa.array([*names, *names]),
            "status": pa.array(["ok"] * 4),
        }
    )
    file = tmp_path / "t.geojson"
    colours = class_colours(2)
    assert write_geojson(file, [table], "key", names, colours, (5, 5)) == 4
    lines = file.read_text().splitlines()[1:-1]
    for row, line in zip(table.to_pylist(), lines, strict=True):
        feature = json.loads(line.rstrip(","))
        assert json.dumps(feature, ensure_ascii=False) == line.rstrip(",")
        namespace = uuid.uuid5(uuid.NAMESPACE_URL, "key")
        assert feature["id"] == str(uuid.uuid5(namespace, str(row["tile"])))
        measured = feature["properties"]["measurements"]
        first = row[f"probability_{names[0]}"]
        assert measured[names[0]] == float(f"{first:.6g}")
        assert measured[names[1]] == float(f"{row['tissue_fraction']:.4g}"), "it is the last"
        assert all(type(value) is float for value in measured.values())
        assert feature["properties"]["classification"]["name"] == row["top_class"]


def test_no_object_is_still_a_collection(tmp_path: Path) -> None:
    file = tmp_path / "t.geojson"
    assert write_geojson(file, [], "key", CLASSES, class_colours(2), (0, 0)) == 0
    assert json.loads(file.read_text())["features"] == []


def test_a_map_is_the_mean_of_the_tiles_at_each_place() -> None:
    x, y = np.array([0, 50, 800]), np.array([0, 0, 900])
    tiles = TileMap(x, y, 100, (1000, 1000), (100, 100))
    mean = tiles.mean(np.array([0.2, 0.6, 1.0], np.float32))
    assert mean[5, 2] == pytest.approx(0.2)
    assert mean[5, 7] == pytest.approx(0.4), "two tiles overlap"
    assert mean[5, 12] == pytest.approx(0.6)
    assert mean[95, 85] == pytest.approx(1)
    assert mean[50, 50] == 0
    assert tiles.count.sum() == 300
    assert not (tiles.count < 0).any()


def test_a_map_may_have_fewer_pixels_than_tiles_and_tiles_that_end_beyond_it() -> None:
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, 100, 3), np.arange(0, 100, 3)))
    tiles = TileMap(x, y, 7, (100, 100), (11, 13))
    values = np.linspace(0, 1, len(x), dtype=np.float32)
    mean = tiles.mean(values)
    left, right = np.rint(x * 0.13).astype(int), np.rint((x + 7) * 0.13).astype(int)
    top, bottom = np.rint(y * 0.11).astype(int), np.rint((y + 7) * 0.11).astype(int)
    for row, column in np.ndindex(11, 13):
        here = (top <= row) & (row < np.maximum(bottom, top + 1))
        here &= (left <= column) & (column < np.maximum(right, left + 1))
        assert tiles.count[row, column] == here.sum()
        assert mean[row, column] == pytest.approx(
            values[here].mean() if here.any() else 0, abs=1e-6
        )


def test_layers_show_the_class_and_leave_the_rest_clear() -> None:
    covered = np.array([[True, True, False]])
    means = [np.array([[0.9, 0.3, 0]], np.float32), np.array([[0.1, 0.7, 0]], np.float32)]
    colours = class_colours(2)
    layer = np.asarray(class_layer(means, covered, colours))
    assert [tuple(pixel) for pixel in layer[0, :2, :3].tolist()] == colours
    assert layer[0, 0, 3] > layer[0, 1, 3] > layer[0, 2, 3] == 0
    heat = np.asarray(heat_layer(means[0], covered))
    assert heat[0, 0, :3].sum() > heat[0, 1, :3].sum()
    assert heat[0, 2, 3] == 0
    picture = overlay(np.full((40, 60, 3), 255, np.uint8), class_layer(means, covered, colours),
        CLASSES, colours)  # fmt: skip
    assert picture.height > 40


def test_colours_differ() -> None:
    assert len(set(class_colours(30))) == 30
    brightness = heat_table().astype(int).sum(1)
    assert (np.diff(brightness) >= -2).all()


def test_a_tally_counts_and_judges() -> None:
    tally = Tally(list(CLASSES))
    tally.add(_table([[0.9, 0.1]] * 8 + [[0.2, 0.8]] * 2, bad=(0,)))
    tally.add(_table([[0.9, 0.1]] * 10))
    said = tally.as_json()
    assert (said["tiles"], said["scored"], said["bad"]) == (20, 19, 1)
    assert said["classes"]["tumour"]["tiles"] == 17
    assert said["classes"]["stroma"]["share"] == pytest.approx(2 / 19)
    assert sum(said["confidence_histogram"]) == 19
    assert said["failures"][0]["message"] == "no pixels"
    assert verdict(tally, 0.05, None) == ("ok", None)
    status, reason = verdict(tally, 0.04, None)
    assert status == "failed"
    assert reason is not None
    assert re.search(r"1 of 20 tiles .*5\.0%.*no pixels", reason)
    assert verdict(Tally(["a"]), 0.05, "glass") == ("empty", "glass")


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})

    def fail_halfway() -> None:
        with fresh(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "none.json") is None


def test_what_a_dead_process_left_is_swept_away(tmp_path: Path) -> None:
    import os
    import socket

    for pid in (os.getpid(), 2**22 + 1):
        (tmp_path / f".tmp-{socket.gethostname()}-{pid}-0-x").write_text("")
    (tmp_path / ".tmp-another-machine-1-0-x").write_text("")
    (tmp_path / "tiles.parquet").mkdir()
    part = f".tmp-{socket.gethostname()}-{2**22 + 1}-0-part-000000.parquet"
    (tmp_path / "tiles.parquet" / part).write_text("")
    sweep(tmp_path)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_a_claim_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    first = claim(tmp_path, "part-1")
    assert first is not None
    assert claim(tmp_path, "part-1") is None
    assert claim(tmp_path, "part-2") is not None
    first.release()
    assert claim(tmp_path, "part-1") is not None


def test_parts_have_the_same_columns_with_or_without_a_good_tile(tmp_path: Path) -> None:
    scores = [[0.9, 0.1], [0.2, 0.8]]
    some, none = _table(scores, bad=(0,)), _table(scores, bad=(0, 1))
    assert some.schema.equals(none.schema)
    for number, part in enumerate((some, none)):
        pq.write_table(part, tmp_path / f"{number}.parquet")
    rows = pq.read_table(tmp_path)["embedding"].to_pylist()
    assert rows == [None, pytest.approx([0.4, 1.6]), None, None]
