"""Whole runs, by the command line as users call it, with a small model of random weights."""

from __future__ import annotations

import json
import random
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic import Classifier
from mambamic.slides.source import open_slide

from .random_checkpoint import CLASSES, write_random_checkpoint
from .slide_files import blobs, write_slide
from .slide_runs import ROOT, command, only, score, score_apart, summary, table

CENTRE, RADIUS, TILE = (950, 1050), 900, 48
LAYOUT = ("--target-mpp", "0.5", "--tile", str(TILE), "--csv")


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of the one that all tests share: tiles are read alike, and cost a quarter."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", input_size=32)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1,800 tiles in the grid, of which a disc has tissue."""
    path = tmp_path_factory.mktemp("slide") / "disc.tiff"
    return write_slide(path, (2048, 2048), 3, blobs([(*CENTRE, RADIUS)]))


@pytest.fixture(scope="module")
def reference(
    slide: Path, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The slide's folder after a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("reference")
    done = score_apart(slide, "--model", random_checkpoint, "--out", out, *LAYOUT)
    assert done.returncode == 0, done.stderr
    return only(out)


def test_the_table_has_a_row_for_each_tile(reference: Path) -> None:
    rows = table(reference)
    expected = ["slide", "tile", "x", "y", "w", "h", "level", "mpp", "tissue_fraction"]
    expected += [f"probability_{name}" for name in CLASSES] + ["top_class", "status", "message"]
    assert rows.column_names == expected
    assert len(list((reference / "tiles.parquet").glob("part-*.parquet"))) > 2
    assert rows["tile"].to_pylist() == list(range(rows.num_rows))
    assert len(set(zip(rows["x"].to_pylist(), rows["y"].to_pylist(), strict=True))) == rows.num_rows
    x, y = (rows[axis].to_numpy() + TILE / 2 for axis in "xy")
    near = np.hypot(x - CENTRE[0], y - CENTRE[1])
    assert near.max() < RADIUS + TILE
    area = np.pi * RADIUS**2 / TILE**2
    assert area < rows.num_rows < 1.15 * area
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert rows["mpp"][0].as_py() == pytest.approx(0.5)
    scores = np.stack([rows[f"probability_{name}"].to_numpy() for name in CLASSES], 1)
    assert np.abs(scores.sum(1) - 1).max() < 1e-5
    assert rows["top_class"].to_pylist() == [CLASSES[n] for n in scores.argmax(1)]
    lines = (reference / "tiles.csv").read_text().splitlines()
    assert len(lines) == rows.num_rows + 1


def test_scores_are_those_of_the_same_pixels(
    reference: Path, slide: Path, random_checkpoint: Path
) -> None:
    rows = table(reference).to_pylist()[::97]
    opened = open_slide(slide)
    tiles = [opened.read(row["x"], row["y"], row["level"], (TILE, TILE)) for row in rows]
    opened.close()
    for row, said in zip(
        rows, Classifier.load(random_checkpoint, "cpu").predict(tiles), strict=True
    ):
        for name, probability in said.probabilities.items():
            assert row[f"probability_{name}"] == pytest.approx(probability, abs=1e-4)


def test_the_record_says_how_it_was_run(reference: Path) -> None:
    record = json.loads((reference.parent / "run.json").read_text())
    assert record["failed"] == []
    assert record["model"]["in_use"]["device"] == "cpu"
    assert {"torch", "openslide-bin", "mambamic"} <= set(record["versions"])
    assert {"read", "preprocess", "model", "write", "elapsed"} <= set(record["seconds"])
    assert record["tiles_scored_by_this_run"] == summary(reference)["tiles"]
    assert record["slides"][0]["resolution"] == {"mpp": 0.5, "source": "metadata"}


def test_a_second_run_finds_nothing_to_do(
    reference: Path, slide: Path, random_checkpoint: Path
) -> None:
    parts = sorted((reference / "tiles.parquet").iterdir())
    before = [part.stat().st_mtime_ns for part in parts]
    out = reference.parent
    done = score(slide, "--model", random_checkpoint, "--out", out, *LAYOUT)
    assert done.returncode == 0
    assert [part.stat().st_mtime_ns for part in parts] == before
    assert json.loads((out / "run.json").read_text())["tiles_scored_by_this_run"] == 0


def test_another_model_or_layout_is_not_mistaken_for_done(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    slide = write_slide(tmp_path / "small.tiff", (768, 768), 1, blobs([(384, 384, 300)]))
    other = write_random_checkpoint(tmp_path / "other", input_size=65)
    out = tmp_path / "out"
    for model, tile in ((random_checkpoint, 256), (other, 256), (random_checkpoint, 300)):
        done = score(slide, "--model", model, "--out", out, "--tile-px", "--tile", tile)
        assert done.returncode == 0, done.stderr
    assert len([path for path in out.iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize(
    ("kills", "stride"), [(3, "36"), pytest.param(10, "24", marks=pytest.mark.soak)]
)
def test_killed_again_and_again_the_table_is_that_of_an_undisturbed_run(
    kills: int, stride: str, slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    layout = ("--model", str(random_checkpoint), *LAYOUT, "--stride", stride)
    assert score(slide, "--out", tmp_path / "reference", *layout).returncode == 0
    reference = only(tmp_path / "reference")
    out = tmp_path / "out"
    call = command(slide, "--out", out, *layout)
    written: dict[str, int] = {}
    chance = random.Random(7)
    for _ in range(kills):
        process = subprocess.Popen(
            call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        before = len(written)
        deadline = time.monotonic() + 120
        # Kills fall everywhere: while it starts, plans, scores and finishes.
        wanted = before + chance.randrange(2)
        while time.monotonic() < deadline and process.poll() is None:
            parts = list(out.glob("*/tiles.parquet/part-*"))
            if len(parts) >= wanted:
                break
            time.sleep(0.02)
        time.sleep(chance.random())
        process.kill()
        process.communicate()
        for part in out.glob("*/tiles.parquet/part-*"):
            stamp = part.stat().st_mtime_ns
            assert written.setdefault(part.name, stamp) == stamp, "a part was scored twice"
    done = score(slide, "--out", out, *layout)
    assert done.returncode == 0, done.stderr
    folder = only(out)
    assert table(folder).equals(table(reference))
    assert summary(folder)["status"] == "ok"
    for part in out.glob("*/tiles.parquet/part-*"):
        assert written.get(part.name, part.stat().st_mtime_ns) == part.stat().st_mtime_ns
    assert not list(out.rglob(".tmp-*")), "nothing half-written is left"


def test_two_processes_share_a_folder(
    reference: Path, slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    call = command(slide, "--out", tmp_path, "--model", random_checkpoint, *LAYOUT)
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL) as other:
        while not list(tmp_path.glob("*/plan.parquet")):
            assert other.poll() is None
            time.sleep(0.05)
        done = score(*call[4:])
        assert (other.wait(timeout=300), done.returncode) == (0, 0), done.stderr
    assert table(only(tmp_path)).equals(table(reference))


def test_what_a_killed_process_had_claimed_another_does(
    reference: Path, slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    call = command(slide, "--out", tmp_path, "--model", random_checkpoint, *LAYOUT)
    first, second = (subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2))
    while not list(tmp_path.glob("*/tiles.parquet/part-*")):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert second.wait(timeout=300) == 0
    assert table(only(tmp_path)).equals(table(reference))


def test_devices_that_are_not_here_are_a_failure(
    slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    done = score(
        slide, "--model", random_checkpoint, "--out", tmp_path / "out", *LAYOUT,
        "--device", "cuda:7", "--devices", 9,
    )  # fmt: skip
    assert done.returncode == 1
    assert "is not here" in done.stderr
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_where_nothing_can_be_read_nothing_is_written_down(
    data_dir: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """A part without any tile is left to another run: the disk may be back by then."""
    where = tmp_path / "damage.geojson"
    ring = [[1150, 1150], [1500, 1150], [1500, 1500], [1150, 1500], [1150, 1150]]
    where.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    done = score(
        data_dir / "slides" / "CMU-1-Small-Region.corrupt.svs",
        *("--model", random_checkpoint, "--out", tmp_path / "out", "--tile-px", "--tile", 100),
        *("--tissue", where, "--min-tissue", 1),
    )
    assert done.returncode == 1
    assert "no tile of a part of" in done.stderr
    assert not list(tmp_path.glob("out/*/tiles.parquet/part-*"))


def test_a_full_disk_is_said_in_one_line_and_what_was_done_is_kept(
    slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """Files of at most 100 kB: the overview does not fit."""
    call = (slide, "--out", tmp_path / "o", "--model", random_checkpoint, *LAYOUT)
    done = score_apart(*call, before=("prlimit", "--fsize=100000"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("mambamic score: ")
    assert "run again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "o").rglob(".tmp-*"))


def test_a_process_per_device_gives_the_same_table(
    reference: Path, slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    done = score(
        slide, "--model", random_checkpoint, "--out", tmp_path, *LAYOUT,
        "--device", "cpu", "--devices", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert table(only(tmp_path)).equals(table(reference))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["tiles_scored_by_this_run"] == table(reference).num_rows


def test_damaged_slides_do_not_stop_the_others(
    data_dir: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    slides = data_dir / "slides"
    names = ("CMU-1-Small-Region.truncated", "CMU-1-Small-Region.corrupt", "CMU-1-Small-Region")
    out = tmp_path / "out"
    done = score(
        *(slides / f"{name}.svs" for name in names),
        *("--model", random_checkpoint, "--out", out, "--tile-px", "--tile", 224),
        *("--tissue", "none", "--embeddings"),
    )
    assert done.returncode == 1
    assert "2 of 3 slides failed" in done.stderr
    (line,) = [text for text in done.stderr.splitlines() if "truncated" in text.split()[0]]
    assert "cannot be opened" in line
    corrupt = table(only(out, "CMU-1-Small-Region.corrupt"))
    whole = table(only(out, "CMU-1-Small-Region-"))
    assert corrupt.num_rows == whole.num_rows == 117
    bad = [row for row in corrupt.to_pylist() if row["status"] != "ok"]
    assert 0 < len(bad) <= 10
    for row in bad:
        assert row["status"] == "unreadable"
        assert row["message"]
        assert row["top_class"] is None
        assert row["embedding"] is None
        assert {row[f"probability_{name}"] for name in CLASSES} == {None}
    good = [row["tile"] for row in corrupt.to_pylist() if row["status"] == "ok"]
    columns = [name for name in whole.column_names if name != "slide"]
    assert corrupt.select(columns).take(good).equals(whole.select(columns).take(good))
    record = json.loads((out / "run.json").read_text())
    assert [entry["slide"] for entry in record["failed"]] == [f"{name}.svs" for name in names[:2]]
    # A larger share allowed makes it good, from the same table.
    again = score(
        slides / "CMU-1-Small-Region.corrupt.svs",
        *("--model", random_checkpoint, "--out", out, "--tile-px", "--tile", 224),
        *("--tissue", "none", "--embeddings", "--max-bad-tiles", "9%"),
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "run.json").read_text())["tiles_scored_by_this_run"] == 0


def test_a_slide_without_microns_stops_the_plan(
    data_dir: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    slides = data_dir / "slides"
    arguments = ("--model", random_checkpoint, "--out", tmp_path / "out", "--target-mpp", 0.5)
    done = score(slides / "TCGA-CR-7395-01A-01-TS1.svs", slides / "op_boxes.tiff", *arguments)
    assert done.returncode == 2
    assert "TCGA-CR-7395-01A-01-TS1.svs: the file states no microns per pixel" in done.stderr
    assert "op_boxes.tiff: mpp 352.8" in done.stderr
    assert "--mpp" in done.stderr
    assert not (tmp_path / "out").exists()
    planned = score(slides / "TCGA-CR-7395-01A-01-TS1.svs", *arguments, "--mpp", 0.25, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert " flag " in planned.stdout
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_resolution_asks_for_one(
    slide: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    done = score(slide, "--model", random_checkpoint, "--out", tmp_path)
    assert done.returncode == 2
    assert "--target-mpp" in done.stderr


def test_no_tiles_are_explained(tmp_path: Path, random_checkpoint: Path) -> None:
    blank = write_slide(tmp_path / "blank.tiff", (1024, 1024), 1, blobs([]))
    done = score(blank, "--model", random_checkpoint, "--out", tmp_path / "out", "--tile-px")
    assert done.returncode == 0
    assert "empty: Otsu's threshold of" in done.stdout
    folder = only(tmp_path / "out")
    assert "0.00% of the slide as tissue" in summary(folder)["reason"]
    assert (folder / "tissue.png").exists()
    assert "What was taken for tissue" in (folder / "report.html").read_text()


def test_tiles_in_a_zip_and_a_folder(tmp_path: Path, random_checkpoint: Path) -> None:
    folder = tmp_path / "tiles"
    (folder / "deep").mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40 + number, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "deep" / f"{number}.png")
    (folder / "bad.png").write_bytes(b"no image")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    common = ("--model", random_checkpoint, "--out", tmp_path / "out", "--max-bad-tiles", "50%")
    done = score(folder, tmp_path / "packed.zip", *common, "--tiles")
    assert done.returncode == 0, done.stderr
    first, second = (table(only(tmp_path / "out", stem)) for stem in ("tiles", "packed"))
    assert first["name"].to_pylist() == ["bad.png", *(f"deep/{n}.png" for n in range(5))]
    assert first["status"].to_pylist() == ["unreadable", *["ok"] * 5]
    assert first["x"].null_count == 6
    assert first.drop_columns(["slide"]).equals(second.drop_columns(["slide"]))


def test_labels_and_macro_images_are_not_read(
    data_dir: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """Blackened in a copy of the file, they change nothing in any output."""
    import tifffile

    source = data_dir / "slides" / "CMU-1-Small-Region.svs"
    blackened = tmp_path / "black" / source.name
    blackened.parent.mkdir()
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as file:
        private = [page for page in file.pages if page.index > 0]
        for page in private:
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                data[start : start + count] = bytes(count)
    assert len(private) == 3, "thumbnail, label and macro"
    blackened.write_bytes(data)
    made = []
    for name, path in (("a", source), ("b", blackened)):
        done = score(
            path, "--model", random_checkpoint, "--out", tmp_path / name, "--tile-px",
            "--tile", 448,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made.append(only(tmp_path / name))
    assert table(made[0]).equals(table(made[1]))
    for name in ("overview.jpg", "tissue.png", "heatmap.png", "overlay.png"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()
