"""A Classifier on ONNX Runtime: what it answers, and which files it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mambamic import Classifier
from mambamic.checkpoint import CARD_FILE, CONFIG_FILE, load_checkpoint
from mambamic.errors import BackendError, CheckpointError, UsageError
from mambamic.export.onnx_export import write_onnx
from mambamic.export.onnx_verify import random_pixels
from mambamic.ood import fit_detector, store_detector


@pytest.fixture(scope="module")
def file(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(
        load_checkpoint(random_checkpoint), tmp_path_factory.mktemp("onnx") / "model.onnx"
    )


def test_answers_as_with_torch(random_checkpoint: Path, file: Path) -> None:
    pixels = random_pixels(5, 64)
    ours, theirs = Classifier.load(file, max_batch=2), Classifier.load(random_checkpoint, "cpu")
    assert (ours.backend, ours.device.type, ours.fused) == ("onnxruntime", "cpu", True)
    assert ours.config == theirs.config
    for found, expected in zip(ours.outputs(pixels), theirs.outputs(pixels), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    for one, other in zip(ours.predict(list(pixels)), theirs.predict(list(pixels)), strict=True):
        assert one.label == other.label
    assert ours.predict([]) == []
    ours.warm_up()
    described = ours.describe()
    assert described.keys() == theirs.describe().keys()
    assert described["versions"].keys() == {"mambamic", "onnxruntime", "python"}


def test_no_image_is_no_row(file: Path) -> None:
    probabilities, embeddings = Classifier.load(file).outputs(np.empty((0, 64, 64, 3), np.uint8))
    assert (len(probabilities), len(embeddings)) == (0, 0)


def test_a_detector_beside_the_file_is_used(
    random_checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "model"))
    classifier = Classifier.load(folder, "cpu")
    pixels = random_pixels(60, 64)
    detector = fit_detector(classifier.embeddings(pixels), np.arange(60) % 2)
    store_detector(load_checkpoint(folder), detector)
    shutil.copy(file, folder)
    scores = [
        [p.ood_score for p in Classifier.load(folder, backend=backend).predict(list(pixels[:3]))]
        for backend in ("onnxruntime", "cpu")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_a_folder_with_weights_and_a_file_takes_the_weights_unless_asked(
    random_checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "both"))
    shutil.copy(file, folder)
    assert Classifier.load(folder, "cpu").backend == "cpu"
    assert Classifier.load(folder, backend="onnxruntime").backend == "onnxruntime"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (CONFIG_FILE, CARD_FILE, file.name):
        shutil.copy(folder / name, bare)
    assert Classifier.load(bare).backend == "onnxruntime"


def test_a_file_that_is_older_than_its_checkpoint_is_refused(
    random_checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "both"))
    shutil.copy(file, folder)
    config = load_checkpoint(folder).config
    described = replace(config, licence="CC-BY-4.0", metrics={"accuracy": 0.9})
    (folder / CONFIG_FILE).write_text(described.to_json(), encoding="utf-8")
    assert Classifier.load(folder, backend="onnxruntime").backend == "onnxruntime"
    calibrated = replace(config, temperature=0.1)
    (folder / CONFIG_FILE).write_text(calibrated.to_json(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"temperature None, .* 0\.1; .*mambamic onnx"):
        Classifier.load(folder, backend="onnxruntime")


@pytest.mark.parametrize(("chosen", "threads"), [("1", 1), ("3", 3), ("", 1), ("many", 1)])
def test_threads_are_as_many_as_the_process_may_use(chosen: str, threads: int, file: Path) -> None:
    # Fewer cores than the machine has.
    code = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
import numpy as np
from mambamic import Classifier
import onnxruntime
before = set(os.listdir("/proc/self/task"))
classifier = Classifier.load({str(file)!r})
classifier.outputs(np.zeros((8, 64, 64, 3), np.uint8))
threads = set(os.listdir("/proc/self/task")) - before
assert all(os.sched_getaffinity(int(one)) == os.sched_getaffinity(0) for one in threads)
print(len(threads))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": chosen},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == threads


def test_what_is_refused(random_checkpoint: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.onnx"):
        Classifier.load(random_checkpoint, backend="onnxruntime")
    with pytest.raises(BackendError, match="'cuda' with ONNX Runtime"):
        Classifier.load(file, "cuda")
    with pytest.raises(BackendError, match="backend 'cpu'"):
        Classifier.load(file, backend="cpu")
    with pytest.raises(UsageError, match="dtype 'float16'"):
        Classifier.load(file, dtype="float16")
    with pytest.raises(BackendError, match="explain"):
        Classifier.load(file).plain_module()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Classifier.load(tmp_path / "none.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Classifier.load(damaged)
    for content in (b"", b"\0" * 64, b"not a network"):
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            Classifier.load(damaged)
    floats = write_onnx(load_checkpoint(random_checkpoint), tmp_path / "f.onnx", float_input=True)
    with pytest.raises(CheckpointError, match="float32 NCHW"):
        Classifier.load(floats)
