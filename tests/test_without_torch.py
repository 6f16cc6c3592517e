"""An environment in which torch is not installed classifies by an ONNX file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.export.onnx_export import write_onnx
from mambamic.export.onnx_verify import random_pixels

from .slide_files import blobs, write_slide
from .slide_runs import only, score, table


@pytest.fixture(scope="module")
def scripts(root: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel and its extra ``ort``."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    install += ["--quiet", "--no-compile", "-c", str(root / "constraints.txt"), f"{wheel}[ort]"]
    subprocess.run(install, check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def file(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(
        load_checkpoint(random_checkpoint), tmp_path_factory.mktemp("onnx") / "model.onnx"
    )


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_torch_is_not_there(scripts: Path, tmp_path: Path) -> None:
    done = run(scripts / "python", "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in done.stderr


def test_predict(
    scripts: Path, random_checkpoint: Path, file: Path, root: Path, tmp_path: Path
) -> None:
    image = root / "examples" / "cell.png"
    done = run(scripts / "mambamic", "predict", str(file), str(image), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (expected,) = Classifier.load(random_checkpoint, "cpu").predict([Image.open(image)])
    assert found["label"] == expected.label
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)


def test_the_classifier_that_everything_else_calls(
    scripts: Path, random_checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    pixels = random_pixels(3, 64)
    np.save(tmp_path / "pixels.npy", pixels)
    code = f"""
import sys, numpy as np
from mambamic import Classifier
classifier = Classifier.load({str(file)!r}, max_batch=2)
classifier.warm_up()
np.savez("found.npz", *classifier.outputs(np.load("pixels.npy")))
assert "torch" not in sys.modules and classifier.describe()["backend"] == "onnxruntime"
"""
    done = run(scripts / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = Classifier.load(random_checkpoint, "cpu").outputs(pixels)
    with np.load(tmp_path / "found.npz") as found:
        for name, values in zip(("arr_0", "arr_1"), expected, strict=True):
            assert np.abs(found[name] - values).max() < 1e-5 * max(1, np.abs(values).max())


def test_score(scripts: Path, random_checkpoint: Path, file: Path, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "disc.tiff", (512, 384), 1, blobs([(200, 200, 150)]))
    options = ["--tile-px", "--tile", "64", "--tissue", "none", "--workers", "1"]
    call = ["score", str(slide), "--model", str(file), "--out", "onnx", *options]
    done = run(scripts / "mambamic", *call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = score(slide, "--model", random_checkpoint, "--out", tmp_path / "torch", *options)
    assert done.returncode == 0, done.stderr
    found, expected = (table(only(tmp_path / place)) for place in ("onnx", "torch"))
    assert found.num_rows == 8 * 6
    assert found.column_names == expected.column_names
    for name in found.column_names:
        values, others = (one[name].to_pylist() for one in (found, expected))
        if isinstance(values[0], float):
            assert values == pytest.approx(others, abs=1e-4)
        else:
            assert values == others


def test_weights_ask_for_torch(scripts: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    done = run(scripts / "mambamic", "predict", str(random_checkpoint), "x.png", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'mambamic[torch]'" in done.stderr
