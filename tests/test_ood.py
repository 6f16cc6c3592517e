from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mambamic import Classifier
from mambamic.checkpoint import OOD_FILE, load_checkpoint
from mambamic.cli import main
from mambamic.errors import CheckpointError, DataError
from mambamic.export.archive import write_archive
from mambamic.ood import auroc, fit_detector, load_detector, made_outliers, store_detector

from .random_checkpoint import CLASSES, write_random_checkpoint


def clusters(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Three long, thin clusters in 12 dimensions."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    centres = 20 * np.eye(3, 12)
    spread = np.array([10.0] + [0.5] * 11)
    points = centres[labels] + random.normal(size=(count, 12)) * spread
    return points.astype(np.float32), labels.astype(np.int64)


def test_one_in_twenty_known_images_is_above_one() -> None:
    detector = fit_detector(*clusters(2000, 0))
    scores = detector.scores(clusters(4000, 1)[0])
    assert (scores > 1).mean() == pytest.approx(0.05, abs=0.015)


def test_the_spread_of_the_classes_counts() -> None:
    detector = fit_detector(*clusters(2000, 0))
    along, across = np.zeros((2, 12), np.float32)
    along[:2], across[:2] = (15, 20), (0, 35)  # as far from the second class, in other directions
    near, far = detector.scores(np.stack([along, across]))
    assert near < 1 < far


def test_the_distance_is_that_of_the_spread_with_its_weakest_directions_alike() -> None:
    random = np.random.default_rng(4)
    labels = random.integers(0, 2, 3000)
    points = random.normal(size=(3000, 200)) * np.geomspace(30, 0.1, 200)
    points[:, 0] += 10 * labels
    detector = fit_detector(points.astype(np.float32), labels)
    assert detector.directions.shape == (200, 64)

    means = np.stack([points[labels == label].mean(0) for label in (0, 1)])
    spread = np.cov((points - means[labels]).T, bias=True)
    spread = 0.9 * spread + 0.1 * np.trace(spread) / 200 * np.eye(200)
    variances, axes = np.linalg.eigh(spread)
    variances[:136] = variances[:136].mean()
    far = random.normal(size=(50, 200)) * 20
    apart = (far[:, np.newaxis] - means) @ axes / np.sqrt(variances)
    exact = np.linalg.norm(apart, axis=2).min(axis=1)
    np.testing.assert_allclose(detector.distances(far), exact, rtol=1e-5)
    # Means far from zero, as embeddings have them, cost no digits.
    moved = replace(detector, means=detector.means + 100)
    np.testing.assert_allclose(moved.distances(far + 100), exact, rtol=1e-5)


def test_several_labels_an_image() -> None:
    points, labels = clusters(600, 0)
    detector = fit_detector(points, np.eye(3, dtype=np.int64)[labels])
    assert len(detector.means) == 3
    np.testing.assert_allclose(
        detector.scores(points), fit_detector(points, labels).scores(points), rtol=1e-5
    )


def test_what_is_no_number_is_unknown() -> None:
    detector = fit_detector(*clusters(200, 0))
    scores = detector.scores(np.full((1, 12), np.nan, np.float32))
    assert scores.tolist() == [np.inf]


def test_too_few_images() -> None:
    with pytest.raises(DataError, match="49 images to fit a detector to; expected at least 50"):
        fit_detector(*clusters(49, 0))


def test_auroc_counts_pairs() -> None:
    known, unknown = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])
    assert auroc(known, unknown) == pytest.approx((1 + 0.5 + 0 + 3) / 6)


def test_made_outliers() -> None:
    tile = np.zeros((40, 40, 3), np.uint8)
    tile[10:30, 10:30] = 255
    made = made_outliers(tile[np.newaxis])
    assert {kind: images.shape for kind, images in made.items()} == dict.fromkeys(
        ("blank", "half scale", "double scale"), (1, 40, 40, 3)
    )
    assert made["double scale"][0, 2:-2, 2:-2].min() > 250
    # A quarter of the white square's area around the centre, and dark beside it.
    assert made["half scale"][0, 18:22, 18:22].min() > 250
    assert made["half scale"][0, 20, 12].max() < 5
    assert np.ptp(made["blank"]) < 40


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", input_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images of two of the classes, in the colours of their class."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(2)
    for number in range(104):
        name = CLASSES[number % len(CLASSES)]
        colours = random.integers(40 * (number % 2), 255, (4, 4, 3), np.uint8)
        target = folder / "val" / name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours).resize((64, 64)).save(target)
    return folder


def test_a_detector_goes_with_the_checkpoint_into_predictions_and_archives(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Classifier.load(checkpoint, device="cpu")
    tile = next((data / "val").rglob("*.png"))
    (plain,) = before.predict([Image.open(tile)])
    assert plain.in_distribution is None
    assert "in_distribution" not in plain.as_json()

    # Of one name, and that of a kind which the report makes itself.
    outliers = [tmp_path / parent / "blank" for parent in ("one", "other")]
    for folder in outliers:
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), (0, 255, 0)).save(folder / "green.png")
    call = ["ood", str(checkpoint), str(data), "--report", "--outliers", *map(str, outliers)]
    assert main([*call, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert [line.split("  ")[0].rstrip() for line in printed.splitlines()[:7]] == [
        *("images", "held-out", "blank", "half scale", "double scale"),
        *map(str, outliers),
    ]
    assert printed.splitlines()[-1] == f"{checkpoint / OOD_FILE}: fitted to 104 images"

    assert main(["predict", str(checkpoint), str(tile), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["in_distribution"] is (told["ood_score"] <= 1)
    assert told["probabilities"] == pytest.approx(plain.as_json()["probabilities"], rel=1e-4)

    archive = write_archive(checkpoint, tmp_path / "cells.mar", model_name="cells", version="1.0")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "unpacked")
    served = Classifier.load(tmp_path / "unpacked", device="cpu")
    (again,) = served.predict([Image.open(tile)])
    assert again.ood_score == pytest.approx(told["ood_score"], rel=1e-3)


def test_a_detector_is_bound_to_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    opened = load_checkpoint(checkpoint)
    assert load_detector(opened) is None
    detector = fit_detector(*clusters(200, 0))
    path = store_detector(opened, detector)
    loaded = load_detector(opened)
    assert loaded is not None
    assert loaded.threshold == detector.threshold
    points = clusters(10, 3)[0]
    np.testing.assert_array_equal(loaded.scores(points), detector.scores(points))

    path.write_bytes(detector.to_bytes("0" * 64))
    with pytest.raises(CheckpointError, match=r"weights of SHA-256 000.*mambamic ood"):
        load_detector(opened)
    path.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_detector(opened)
    shutil.copy(checkpoint / "model.safetensors", path)
    with pytest.raises(CheckpointError, match="was fitted to weights"):
        load_detector(opened)
    damages: list[dict[str, Any]] = [
        {"rest": 0.0},
        {"threshold": np.nan},
        {"directions": np.eye(5, dtype=np.float32)},
    ]
    for bad in damages:
        path.write_bytes(replace(detector, **bad).to_bytes(opened.config.weights_sha256))
        with pytest.raises(CheckpointError, match=r"holds .*expected finite means"):
            load_detector(opened)


@pytest.mark.parametrize("bad", [b"junk", None])
def test_a_bad_detector_is_mended_as_its_error_says(
    checkpoint: Path, data: Path, bad: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    tile = str(next((data / "val").rglob("*.png")))
    other = fit_detector(*clusters(200, 0)).to_bytes("0" * 64)
    (checkpoint / OOD_FILE).write_bytes(other if bad is None else bad)
    assert main(["predict", str(checkpoint), tile, "--device", "cpu"]) == 1
    assert "fit the detector anew by: mambamic ood CHECKPOINT DATA" in capsys.readouterr().err
    assert main(["ood", str(checkpoint), str(data), "--device", "cpu"]) == 0
    assert main(["predict", str(checkpoint), tile, "--device", "cpu", "--json"]) == 0
    assert "ood_score" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_outliers_without_a_report(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ood", str(checkpoint), str(data), "--outliers", str(data)]) == 2
    assert "--report" in capsys.readouterr().err


@pytest.mark.parametrize("again", ["flat", "flat/", "./flat"])
def test_outliers_given_twice(
    again: str, checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ood", str(checkpoint), str(data), "--report", "--outliers", "flat", again]) == 2
    assert "--outliers has flat twice; expected each folder once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "report", "said"),
    [
        (49, [], "49 images in split 'val' of {}; expected at least 50 to fit to; hold back more"),
        (98, ["--report"], "98 images in split 'val' of {}; expected at least 99 to fit to every"),
    ],
)
def test_the_number_of_images_that_are_needed(
    images: int,
    report: list[str],
    said: str,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fewer = shutil.copytree(data, tmp_path / "fewer")
    for path in sorted(fewer.rglob("*.png"))[images:]:
        path.unlink()
    assert main(["ood", str(checkpoint), str(fewer), *report, "--device", "cpu"]) == 1
    assert said.format(fewer) in capsys.readouterr().err
    assert not (checkpoint / OOD_FILE).exists()


def test_embedding_takes_a_bar(
    checkpoint: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["ood", str(checkpoint), str(data), "--report", "--device", "cpu"]) == 0
    shown = capsys.readouterr().err
    assert "embedding val: 100%" in shown
    assert "embedding double scale: 100%" in shown
