"""From a MedMNIST file to a served model, by commands alone."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.cli import main

from ..handler_workers import Worker
from .servers import ROOT

CLASSES = 8
SIDE = 28


def tissue(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw grey cells of eight kinds, as large, bright and oblong as their class says."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.uint8)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    images = np.empty((count, SIDE, SIDE), np.uint8)
    for image, label in zip(images, labels, strict=True):
        radius, bright, oblong = 5 + 5 * (label & 1), 110 + 60 * (label >> 1 & 1), 1 + (label >> 2)
        y, x = random.uniform(11, 17, 2)
        inside = ((rows - y) * oblong) ** 2 + (columns - x) ** 2 < radius**2
        noise = random.normal(0, 8, (SIDE, SIDE))
        image[...] = np.clip(30 + bright * inside + noise, 0, 255)
    return images, labels[:, None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file such as the medmnist package stores: one channel, 28 pixels, labels (N, 1)."""
    path = tmp_path_factory.mktemp("data") / "tissuelike.npz"
    parts = (("train", 96), ("val", 24), ("test", 24))
    arrays = {split: tissue(count, seed) for seed, (split, count) in enumerate(parts)}
    images: dict[str, Any] = {f"{split}_images": part[0] for split, part in arrays.items()}
    labels: dict[str, Any] = {f"{split}_labels": part[1] for split, part in arrays.items()}
    np.savez_compressed(path, **images, **labels)
    return path


def run(*command: str) -> str:
    """What a command prints; in this process, which has imported what it takes."""
    with redirect_stdout(io.StringIO()) as said:
        assert main(list(command)) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short training."""
    out = tmp_path_factory.mktemp("runs") / "tissue"
    run(
        *("train", str(data), "--arch", "mambamic_t", "--out", str(out)),
        *("--device", "cpu", "--input-size", "32", "--epochs", "6", "--warmup-epochs", "1"),
        *("--batch-size", "8", "--ema-decay", "0.7", "--quiet"),
    )
    return out / "checkpoint"


def test_it_is_found_without_fault(data: Path) -> None:
    report = json.loads(run("data", "check", str(data), "--json"))
    assert report["problems"] == []
    assert {name: split["images"] for name, split in report["splits"].items()} == {
        "train": 96, "val": 24, "test": 24,
    }  # fmt: skip


@pytest.fixture(scope="module")
def predicted(trained: Path, data: Path) -> list[str]:
    """What the library says of the test images."""
    images = np.load(data)["test_images"]
    predictions = Classifier.load(trained, device="cpu").predict(
        [Image.fromarray(image) for image in images]
    )
    return [prediction.label for prediction in predictions]


def test_it_trains_and_is_measured(trained: Path, data: Path, predicted: list[str]) -> None:
    config = load_checkpoint(trained).config
    assert config.classes == tuple(map(str, range(CLASSES)))
    assert config.metrics["train_images"] == 96
    words = ["benchmarks.accuracy", str(trained), str(data), "--split", "test", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["images"] == 24
    true = np.load(data)["test_labels"][:, 0]
    assert record["correct"] == int((np.array(predicted, int) == true).sum())
    # Chance is 3 of 24: what was learnt comes out here.
    assert record["correct"] >= 9


def test_its_evaluation_has_a_row_for_each_image(
    trained: Path, data: Path, predicted: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    command = ("evaluate", str(trained), str(data), "--out", str(out))
    run(*command, "--device", "cpu", "--bootstrap", "20")
    (table,) = out.glob("*.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"test[{index}]" for index in range(24)]
    assert [row["true"] for row in rows] == [str(index % CLASSES) for index in range(24)]
    assert [row["predicted"] for row in rows] == predicted


def test_its_archive_answers_as_the_library_does(trained: Path, data: Path, tmp_path: Path) -> None:
    archive = tmp_path / "tissue.mar"
    run("archive", str(trained), "--name", "tissue", "--out", str(archive))
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "unpacked")
    image = Image.fromarray(np.load(data)["test_images"][0])
    png = io.BytesIO()
    image.save(png, "PNG")
    worker = Worker(tmp_path / "unpacked")
    try:
        status, answer = worker.answer_one([("image", "image/png", png.getvalue())])
    finally:
        worker.handler.close()
    (expected,) = Classifier.load(trained, device="cpu").predict([image])
    assert status == 200
    assert answer["label"] == expected.label
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
