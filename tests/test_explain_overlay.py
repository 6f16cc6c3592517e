from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mambamic.explain.explanation import Explanation
from mambamic.explain.methods import Heat
from mambamic.explain.overlay import encode, overlay
from mambamic.prediction import Prediction
from mambamic.preprocess import Preprocess

PREPROCESS = Preprocess(64)


def explained(heat: Heat, label: str = "a", best: str = "a") -> Explanation:
    return Explanation(Prediction(best, 0.75, {label: 0.25, best: 0.75}), label, "occlusion", heat)


def corner() -> Heat:
    heat = np.zeros((64, 64), np.float32)
    heat[:16, 40:] = 3.5
    return heat


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def difference(picture: Image.Image, image: Image.Image) -> NDArray[np.int64]:
    part = picture.crop((0, 0, *image.size))
    changed: NDArray[np.int64] = np.abs(np.asarray(part, int) - np.asarray(image, int)).sum(-1)
    return changed


def test_the_heat_lies_over_its_place_at_the_images_own_size() -> None:
    image = grey(320, 200)
    picture = overlay(image, explained(corner()), PREPROCESS)
    assert picture.width == 320
    assert 200 + 20 < picture.height < 200 + 60
    changed = difference(picture, image)
    assert changed[:40, 220:].min() > 60
    assert changed[:, :180].max() == 0
    assert changed[60:].max() == 0


def test_what_the_model_does_not_see_stays_as_it_is() -> None:
    image = grey(300, 100)
    everywhere = np.ones((64, 64), np.float32)
    preprocess = Preprocess(64, resize="shorter_side")
    changed = difference(overlay(image, explained(everywhere), preprocess), image)
    assert changed[:, 100:200].min() > 60
    assert changed[:, :99].max() == changed[:, 201:].max() == 0


def test_no_evidence_leaves_the_image_as_it_is() -> None:
    image = grey(64, 64)
    picture = overlay(image, explained(np.zeros((64, 64), np.float32)), PREPROCESS)
    assert difference(picture, image).max() == 0


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (3, 500), (2000, 1500)])
def test_a_caption_fits_under_an_image_of_any_size(size: tuple[int, int]) -> None:
    picture = overlay(grey(*size), explained(corner(), "a b c " * 40, "b"), PREPROCESS)
    strip = np.asarray(picture.convert("L"))[size[1] :]
    assert strip.min() < 100
    # White all around: nothing is cut off.
    for edge in (strip[0], strip[-1], strip[:, 0], strip[:, -1]):
        assert edge.min() == 255


def test_captions_of_other_classes_and_probabilities_differ() -> None:
    pictures = {
        encode(overlay(grey(200, 50), explained(corner(), label), PREPROCESS))
        for label in ("a", "b", "c")
    }
    assert len(pictures) == 3
    assert all(Image.open(io.BytesIO(data)).format == "PNG" for data in pictures)
