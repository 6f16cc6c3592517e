"""Mean and standard deviation, against NumPy on all pixels at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic.data.stats import statistics
from mambamic.errors import DataError
from mambamic.preprocess import Preprocess

SIZES = ((9, 5), (16, 16), (7, 12))


@pytest.fixture
def images() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [
        random.integers(0, [[[250, 120, 30]]], (height, width, 3)).astype(np.uint8)
        for width, height in SIZES
    ]


@pytest.fixture
def data(tmp_path: Path, images: list[np.ndarray]) -> Path:
    (tmp_path / "train/a").mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"train/a/{index}.png")
    return tmp_path


def test_of_images_as_they_are_stored(data: Path, images: list[np.ndarray]) -> None:
    found = statistics(data)
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    assert found.mean == pytest.approx(pixels.mean(0), abs=1e-12)
    assert found.std == pytest.approx(pixels.std(0), abs=1e-12)
    assert (found.images, found.pixels) == (3, len(pixels))
    assert found.as_json()["mean"] == [round(value, 4) for value in pixels.mean(0)]


@pytest.mark.parametrize("resize", ["stretch", "shorter_side"])
def test_of_images_as_the_model_sees_them(
    resize: str, data: Path, images: list[np.ndarray]
) -> None:
    rule = Preprocess(input_size=6, resize=resize)
    found = statistics(data, preprocess=rule)
    pixels = np.stack([rule.pixels(Image.fromarray(image)) for image in images]) / 255
    assert found.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-12)
    assert found.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-12)
    assert found.pixels == 3 * 36


def test_of_arrays(tmp_path: Path) -> None:
    images = np.random.default_rng(2).integers(0, 256, (5, 28, 28), np.uint8)
    np.savez(tmp_path / "x.npz", test_images=images, test_labels=np.arange(5)[:, None])
    found = statistics(tmp_path / "x.npz", "test")
    assert found.mean == pytest.approx([images.mean() / 255] * 3, abs=1e-12)
    assert found.std == pytest.approx([images.std() / 255] * 3, abs=1e-12)


def test_what_cannot_be_summed_up(data: Path) -> None:
    with pytest.raises(DataError, match=r"has neither val/ nor val\.zip"):
        statistics(data, "val")
    (data / "val/a").mkdir(parents=True)
    with pytest.raises(DataError, match="has no images in split 'val'"):
        statistics(data, "val")
    (data / "train/a/x.png").write_bytes(b"no")
    with pytest.raises(DataError, match="1 of 4 images of split 'train' cannot be read"):
        statistics(data)
