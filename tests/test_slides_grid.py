from __future__ import annotations

import numpy as np
import pytest

from mambamic.slides.grid import lay_out, positions
from mambamic.slides.source import SlideInfo


def _info(width: int, height: int, bounds: tuple[int, int, int, int] | None = None) -> SlideInfo:
    sizes = tuple((width // f, height // f) for f in (1, 4, 16))
    whole = bounds or (0, 0, width, height)
    return SlideInfo("openslide", "x", sizes, (1.0, 4.0, 16.0), None, None, whole)


@pytest.mark.parametrize(("tile", "stride", "ratio"), [(100, 100, 1), (100, 60, 1), (64, 64, 3.37)])
def test_every_whole_tile_is_there_once(tile: int, stride: int, ratio: float) -> None:
    info = _info(1234, 777)
    layout = lay_out(info, tile, stride, ratio)
    x, y = positions(info, layout)
    expected = {
        (round(c * stride * ratio), round(r * stride * ratio))
        for c in range(200)
        for r in range(200)
        if c * stride * ratio + layout.size <= 1234.5 and r * stride * ratio + layout.size <= 777.5
    }
    assert len(x) == len(expected)
    assert set(zip(x.tolist(), y.tolist(), strict=True)) == expected


def test_tiles_lie_within_the_bounds() -> None:
    info = _info(1000, 1000, (300, 400, 250, 350))
    x, y = positions(info, lay_out(info, 100, 100, 1))
    assert sorted(set(x.tolist())) == [300, 400]
    assert sorted(set(y.tolist())) == [400, 500, 600]


def test_a_tile_is_read_from_the_best_level_at_about_its_own_size() -> None:
    layout = lay_out(_info(10000, 10000), 224, 224, 5.0)
    assert (layout.level, layout.read_size, layout.size) == (1, 280, 1120)
    forced = lay_out(_info(10000, 10000), 224, 224, 5.0, level=0)
    assert (forced.level, forced.read_size, forced.size) == (0, 1120, 1120)


def test_a_run_of_tiles_is_a_region() -> None:
    info = _info(64 * 100, 64 * 100)
    x, y = positions(info, lay_out(info, 100, 100, 1))
    for start in range(0, len(x), 64):
        part = slice(start, start + 64)
        assert np.ptp(x[part]) == np.ptp(y[part]) == 700, "8 by 8 tiles"


def test_a_slide_smaller_than_a_tile_has_none() -> None:
    info = _info(50, 5000)
    assert len(positions(info, lay_out(info, 100, 100, 1))[0]) == 0
