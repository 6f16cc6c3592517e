"""From an image of any size to the model's square."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mambamic.errors import UsageError
from mambamic.preprocess import Preprocess

NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_stretch_is_pillows_antialiased_resize(interpolation: str) -> None:
    pixels = Preprocess(48, "stretch", interpolation).pixels(NOISE)
    filter_ = Image.Resampling[interpolation.upper()]
    assert pixels.dtype == np.uint8
    assert (pixels == np.asarray(NOISE.resize((48, 48), filter_))).all()


def test_shorter_side_takes_the_centre() -> None:
    pixels = Preprocess(30, "shorter_side").pixels(NOISE)
    whole = NOISE.resize((40, 30), Image.Resampling.BILINEAR)
    assert (pixels == np.asarray(whole.crop((5, 0, 35, 30)))).all()


@pytest.mark.parametrize("resize", ["stretch", "shorter_side"])
def test_right_size_stays_as_it_is(resize: str) -> None:
    image = NOISE.crop((0, 0, 64, 64))
    assert (Preprocess(64, resize).pixels(image) == np.asarray(image)).all()


@pytest.mark.parametrize("resize", ["stretch", "shorter_side"])
@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1)])
def test_extreme_shapes(resize: str, size: tuple[int, int]) -> None:
    pixels = Preprocess(32, resize).pixels(Image.new("RGB", size, (1, 2, 3)))
    assert (pixels == (1, 2, 3)).all()
    assert pixels.shape == (32, 32, 3)


def test_other_modes_are_converted() -> None:
    pixels = Preprocess(8).pixels(Image.new("L", (8, 8), 77))
    assert (pixels == 77).all()


def test_normalise() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    batch = np.random.default_rng(4).integers(0, 256, (2, 5, 7, 3), np.uint8)
    result = Preprocess(5, mean=mean, std=std).normalise(batch)
    expected = (batch.astype(np.float64) / 255 - mean) / std
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize("wrong", [{"resize": "pad"}, {"interpolation": "nearest"}])
def test_unknown_rule(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} '.*expected one of"):
        Preprocess(**wrong)  # type: ignore[arg-type]
