from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic.errors import SlideError, UsageError
from mambamic.slides.overview import Overview, read_overview
from mambamic.slides.tissue import find_tissue, mask_for, otsu, tissue_fractions


def _overview(pixels: np.ndarray, known: np.ndarray | None = None) -> Overview:
    there = np.ones(pixels.shape[:2], bool) if known is None else known
    return Overview(pixels, there, (pixels.shape[1] * 10, pixels.shape[0] * 10), (50, 20))


@pytest.fixture
def slide() -> np.ndarray:
    """Paper with a purple rectangle in it."""
    grain = np.random.default_rng(0).integers(0, 6, (60, 80, 1))
    pixels = np.full((60, 80, 3), 240) - grain
    pixels[10:30, 20:60] = (150, 70, 160) + grain[10:30, 20:60] * 4
    return pixels.astype(np.uint8)


def test_otsu_parts_two_groups() -> None:
    values = np.r_[np.full(900, 10), np.full(100, 200)].astype(np.uint8)
    assert 10 <= otsu(values) < 200
    assert otsu(np.zeros(0, np.uint8)) == 0


def test_tissue_is_what_has_colour(slide: np.ndarray) -> None:
    tissue = find_tissue("otsu", None, _overview(slide))
    assert tissue.mask[10:30, 20:60].all()
    assert tissue.mask.sum() == 20 * 40
    assert tissue.share == pytest.approx(800 / 4800)


def test_glass_alone_is_no_tissue_and_tissue_alone_is_all_of_it() -> None:
    grain = np.random.default_rng(0).integers(0, 6, (50, 50, 3))
    assert find_tissue("otsu", None, _overview((235 + grain).astype(np.uint8))).share < 0.01
    pale = np.random.default_rng(0).integers(50, 150, (50, 50))
    pixels = np.stack([255 - pale // 4, 255 - pale, 255 - pale // 4], -1).astype(np.uint8)
    assert find_tissue("otsu", None, _overview(pixels)).share > 0.98


def test_what_could_not_be_read_may_be_tissue(slide: np.ndarray) -> None:
    known = np.ones(slide.shape[:2], bool)
    known[40:, :10] = False
    assert find_tissue("otsu", None, _overview(slide, known)).mask[40:, :10].all()


def test_a_mask_image_of_another_shape_is_refused(tmp_path: Path, slide: np.ndarray) -> None:
    Image.new("L", (40, 30), 255).save(tmp_path / "good.png")
    assert find_tissue("otsu", tmp_path / "good.png", _overview(slide)).share == 1
    Image.new("L", (30, 40)).save(tmp_path / "bad.png")
    with pytest.raises(UsageError, match="30 x 40"):
        find_tissue("otsu", tmp_path / "bad.png", _overview(slide))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match=r"the mask .*text.png of --tissue \(8 bytes that are not"):
        find_tissue("otsu", tmp_path / "text.png", _overview(slide))


def test_geojson_is_drawn_with_its_holes_from_the_corner_of_the_bounds(
    tmp_path: Path, slide: np.ndarray
) -> None:
    outer = [[0, 0], [400, 0], [400, 300], [0, 300], [0, 0]]
    hole = [[100, 100], [200, 100], [200, 200], [100, 200], [100, 100]]
    shape = {"type": "Polygon", "coordinates": [outer, hole]}
    feature = {"type": "Feature", "geometry": shape, "properties": {}}
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    mask = find_tissue("none", file, _overview(slide)).mask
    assert mask[3, 6]
    assert not mask[1, 6], "above the bounds, which begin at y 20"
    assert not mask[17, 20], "in the hole"
    assert mask.sum() == pytest.approx(40 * 30 - 10 * 10, rel=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[1]",
        "[" * 100_000,
        '{"type": "Point", "coordinates": [1, 2]}',
        '{"type": "Polygon", "coordinates": []}',
        '{"type": "Polygon", "coordinates": [[]]}',
        '{"type": "Polygon", "coordinates": [[[1, 1], [2, 2]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9]], [[1, 1]]]}',
        '{"type": "Polygon", "coordinates": [[[NaN, 0], [9, 0], [9, 9]]]}',
    ],
)
def test_geojson_without_areas_is_refused(tmp_path: Path, slide: np.ndarray, text: str) -> None:
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(UsageError, match="GeoJSON with polygons"):
        find_tissue("otsu", tmp_path / "a.geojson", _overview(slide))


def test_fractions_are_counted_in_each_tile() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:5] = True
    corners = np.array([0, 0, 500]), np.array([0, 500, 300])
    assert tissue_fractions(mask, corners, 400, (1000, 1000)).tolist() == [1, 0, 0.5]


def test_a_folder_of_masks_has_one_for_each_slide(tmp_path: Path) -> None:
    (tmp_path / "one.geojson").write_text("{}")
    assert mask_for(tmp_path, Path("x/one.svs")) == tmp_path / "one.geojson"
    with pytest.raises(SlideError, match=r"no mask for two\.svs"):
        mask_for(tmp_path, Path("x/two.svs"))


def test_the_mosaic_loses_its_blanks_and_no_cell(data_dir: Path) -> None:
    overview = read_overview(data_dir / "slides" / "pbc_mosaic.tiff")
    tissue = find_tissue("otsu", None, overview)
    truth = json.loads((data_dir / "slides" / "pbc_mosaic.truth.json").read_text())
    corners = tuple(np.array([cell[axis] for cell in truth]) for axis in "xy")
    share = tissue_fractions(tissue.mask, (corners[0], corners[1]), 200, (7200, 7200))
    blank = np.array([cell["label"] == "blank" for cell in truth])
    assert blank.sum() == 120
    assert (share[blank] < 0.1).all()
    assert (share[~blank] < 0.1).mean() <= 0.01
