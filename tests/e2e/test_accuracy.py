"""The demo server on real cells: the answers over HTTP are those of the library."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

import pytest

from mambamic import Classifier
from mambamic.images import decode

from .servers import RunningServer

IMAGES = 300


def test_300_cells_get_the_labels_and_probabilities_of_the_library(
    server: RunningServer, classifier: Classifier, data_dir: Path
) -> None:
    with zipfile.ZipFile(data_dir / "pbc200" / "test.zip") as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        names = names[:: len(names) // IMAGES][:IMAGES]
        cells = [archive.read(name) for name in names]
    expected = classifier.predict([decode(cell) for cell in cells])

    # One field per tile, several requests: neither the form nor the batch changes an answer.
    correct = 0
    for start in range(0, IMAGES, 50):
        part = range(start, start + 50)
        answer = server.form(*((f"cell{i}", cells[i], "image/webp") for i in part))
        assert answer.status == 200, answer.body[:500]
        for i, got in zip(part, answer.json, strict=True):
            assert got["name"] == f"cell{i}"
            assert got["label"] == expected[i].label
            assert got["probabilities"] == pytest.approx(expected[i].probabilities, abs=1e-5)
            correct += got["label"] == PurePosixPath(names[i]).parent.name
    print(f"{correct} of {IMAGES} are right")
    assert correct >= 0.97 * IMAGES
