"""Heat maps point to the cell, not to its mirror image, and depend on the weights."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mambamic import Classifier, create_model
from mambamic.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mambamic.config import Config
from mambamic.explain import methods
from mambamic.explain.methods import (
    Heat,
    attributions,
    background,
    grad_cam,
    integrated_gradients,
    log_odds,
    occlusion,
)
from mambamic.preprocess import Pixels

from .random_checkpoint import CLASSES, write_random_checkpoint

PLASMA = (253, 233, 206)  # the colour between the cells of these images
SIDE, CANVAS = 100, 200
# Left and top of cells whose mirror images across the diagonal are elsewhere.
CORNERS = {"eosinophil": (SIDE, 0), "erythroblast": (0, SIDE)}


@dataclass(frozen=True)
class Placed:
    """A cell off the centre and off the diagonal, and what two methods say of it."""

    pixels: Pixels
    target: int
    box: tuple[slice, slice]
    occluded: Heat
    integrated: Heat

    @property
    def mirrored(self) -> tuple[slice, slice]:
        return self.box[::-1]


def first_cell(data_dir: Path, name: str) -> Image.Image:
    with zipfile.ZipFile(data_dir / "pbc200" / "val.zip") as archive:
        files = [entry for entry in archive.namelist() if f"/{name}/" in entry]
        first = min(entry for entry in files if not entry.endswith("/"))
        return Image.open(io.BytesIO(archive.read(first))).convert("RGB")


def place(cell: Image.Image, corner: tuple[int, int]) -> Image.Image:
    margin = 35
    square = (margin, margin, CANVAS - margin, CANVAS - margin)
    small = cell.crop(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    mask = Image.new("L", small.size)
    ImageDraw.Draw(mask).ellipse((2, 2, SIDE - 3, SIDE - 3), fill=255)
    canvas = Image.new("RGB", (CANVAS, CANVAS), PLASMA)
    canvas.paste(small, corner, mask.filter(ImageFilter.GaussianBlur(2)))
    return canvas


def share(heat: Heat, box: tuple[slice, slice]) -> float:
    return float(heat[box].sum() / heat.sum())


def rank_correlation(one: Heat, other: Heat) -> float:
    def ranks(heat: Heat) -> NDArray[np.intp]:
        cells = np.asarray(Image.fromarray(heat).resize((14, 14), Image.Resampling.BOX))
        return cells.ravel().argsort().argsort()

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def coarser(patch: pytest.MonkeyPatch, grid: int) -> None:
    """Have windows of the usual size cover fewer places."""
    patch.setattr(methods, "_WINDOW", methods._WINDOW * grid / methods._GRID)
    patch.setattr(methods, "_GRID", grid)


@pytest.fixture(scope="module")
def demo(root: Path) -> Iterator[Classifier]:
    """The demo, and occlusion at half of the places: each is a prediction."""
    with pytest.MonkeyPatch.context() as patch:
        coarser(patch, 10)
        yield Classifier.load(root / "model_store" / "mambamic_t_pbc", device="cpu")


@pytest.fixture(scope="module", params=CORNERS)
def placed(request: pytest.FixtureRequest, demo: Classifier, data_dir: Path) -> Placed:
    name = request.param
    cell = first_cell(data_dir, name)
    left, top = CORNERS[name]
    image = place(cell, (left, top))
    pixels = demo.preprocess.pixels(image)
    (prediction,) = demo.predict([image])
    assert prediction.label == name, "a cell that the model does not know explains nothing"
    target, scale = demo.config.classes.index(name), len(pixels) / CANVAS
    rows, columns = (
        slice(round(start * scale), round((start + SIDE) * scale)) for start in (top, left)
    )
    return Placed(
        pixels,
        target,
        (rows, columns),
        occlusion(demo, pixels, target),
        integrated_gradients(demo, pixels, target),
    )


def test_the_cell_is_found_and_not_its_mirror_image(placed: Placed) -> None:
    for heat, least in ((placed.occluded, 0.7), (placed.integrated, 0.8)):
        assert heat.shape == placed.pixels.shape[:2]
        assert heat.min() >= 0
        assert share(heat, placed.box) > least
        assert share(heat, placed.mirrored) < 0.1
        peak = np.unravel_index(heat.argmax(), heat.shape)
        assert all(side.start <= at < side.stop for at, side in zip(peak, placed.box, strict=True))


def test_gradients_agree_with_occlusion_and_not_with_its_mirror_image(placed: Placed) -> None:
    agreement = rank_correlation(placed.occluded, placed.integrated)
    assert agreement > 0.5
    mirrored = np.ascontiguousarray(placed.integrated.T)
    assert rank_correlation(placed.occluded, mirrored) < agreement - 0.5


def test_other_weights_give_another_map(
    root: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarser(monkeypatch, 7)
    # At half of its inputs' side: what the demo then takes the cell for does not matter.
    stated = load_checkpoint(root / "model_store" / "mambamic_t_pbc")
    half = replace(stated.config, input_size=stated.config.input_size // 2)
    demo = Classifier.load(Checkpoint(stated.path, half), device="cpu")
    # A whole image: beside a cell on plain ground every map is empty, whatever the weights.
    pixels = demo.preprocess.pixels(first_cell(data_dir, "eosinophil"))
    folder = write_random_checkpoint(tmp_path / "random", input_size=len(pixels))
    random = Classifier.load(folder, device="cpu")
    assert rank_correlation(occlusion(demo, pixels, 1), occlusion(random, pixels, 1)) < 0.7
    known, guessed = (integrated_gradients(model, pixels, 1) for model in (demo, random))
    assert rank_correlation(known, guessed) < 0.8


@pytest.fixture(scope="module")
def small(random_checkpoint: Path) -> Classifier:
    return Classifier.load(random_checkpoint, device="cpu")


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def medmamba(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Classifier:
    torch.manual_seed(3)
    model = create_model("medmamba_t", len(CLASSES))
    model.head.weight.data.mul_(20)
    config = Config("medmamba_t", CLASSES, input_size=64, head=request.param)
    folder = tmp_path_factory.mktemp("medmamba") / "random"
    save_checkpoint(folder, config, model.state_dict(), "# Random weights\n")
    return Classifier.load(folder, device="cpu")


def noise(size: int = 64) -> Pixels:
    return np.random.default_rng(4).integers(0, 256, (size, size, 3), np.uint8)


def test_grad_cam_of_the_last_stage_is_the_head_applied_to_each_place(
    medmamba: Classifier,
) -> None:
    pixels, target = noise(), 2
    model = medmamba.plain_module()
    kept: list[torch.Tensor] = []
    hook = model.layers[3].register_forward_hook(lambda *call: kept.append(call[-1]))
    with torch.no_grad():
        x = torch.from_numpy(medmamba.preprocess.normalise(pixels[np.newaxis]))
        logits = model(x)[0]
    hook.remove()
    weights = model.head.weight[target]
    if medmamba.config.head == "softmax":
        others = [other for other in range(len(CLASSES)) if other != target]
        weights = weights - logits[others].softmax(0) @ model.head.weight[others]
    places = (kept[0][0] @ weights).numpy()  # the mean's 1 / (H W) is a mere factor
    side = len(places)
    expected = np.maximum(
        np.asarray(Image.fromarray(places).resize((64, 64), Image.Resampling.BICUBIC)), 0
    )
    heat = grad_cam(medmamba, pixels, target)
    np.testing.assert_allclose(heat * side**2, expected, atol=1e-4 * np.abs(places).max())
    # For random weights all places may speak against a class, but not against every class.
    assert max(grad_cam(medmamba, pixels, other).max() for other in range(3)) > 0


def test_every_stage_has_a_map_of_its_own(medmamba: Classifier) -> None:
    heats = [grad_cam(medmamba, noise(), 1, stage) for stage in (1, 2, 3, 4)]
    assert {heat.shape for heat in heats} == {(64, 64)}
    for one, other in pairwise(heats):
        assert not np.allclose(one, other)


def test_integrated_gradients_sum_to_the_difference_of_the_log_odds(small: Classifier) -> None:
    # Smooth pixels, near the background: what a few steps resolve.
    pixels = np.asarray(Image.fromarray(noise(4) // 8 + 110).resize((64, 64)))
    plain = np.broadcast_to(background(pixels), pixels.shape)
    odds = log_odds(small.probabilities(np.stack([plain, pixels])), 5, "softmax")
    signed = attributions(small, pixels, 5)
    assert signed.sum() == pytest.approx(odds[1] - odds[0], abs=0.05 * abs(odds[1] - odds[0]))


def test_a_plain_image_has_no_evidence(small: Classifier) -> None:
    plain = np.full((64, 64, 3), 200, np.uint8)
    assert occlusion(small, plain, 0).max() == pytest.approx(0, abs=1e-4)
    assert integrated_gradients(small, plain, 0).max() == 0


def test_log_odds_do_not_saturate() -> None:
    certain = np.array([[1.0, 1e-12, 1e-30], [1.0, 1e-20, 0.0]], np.float32)
    near, nearer = log_odds(certain, 0, "softmax")
    assert near == pytest.approx(12 * np.log(10), rel=1e-4)
    assert nearer == pytest.approx(20 * np.log(10), rel=1e-4)
    (apart,) = log_odds(np.array([[0.25, 0.9]], np.float32), 0, "sigmoid")
    assert apart == pytest.approx(-np.log(3), rel=1e-6)
    assert np.isfinite(log_odds(np.array([[0.0, 1.0]], np.float32), 0, "softmax")).all()


def test_the_background_is_the_colour_of_the_edge() -> None:
    pixels = np.full((20, 20, 3), (1, 2, 3), np.uint8)
    pixels[3:17, 3:17] = 255
    assert background(pixels).tolist() == [1, 2, 3]
