"""One answer per image, whatever travels with it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from mambamic import Classifier, create_model
from mambamic.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mambamic.config import Config
from mambamic.engine import find_device
from mambamic.errors import BackendError, CheckpointError, ShapeError, UsageError
from mambamic.images import decode
from mambamic.prediction import Prediction

from .random_checkpoint import write_random_checkpoint

RNG = np.random.default_rng(11)
# Blobs of colour: with noise alone every image would look alike to the network.
TILES = np.stack(
    [
        np.asarray(Image.fromarray(RNG.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64)))
        for _ in range(7)
    ]
)


@pytest.fixture(scope="module")
def classifier(random_checkpoint: Path) -> Classifier:
    return Classifier.load(random_checkpoint, device="cpu")


def logits_of(checkpoint: Checkpoint, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    config = checkpoint.config
    model = create_model(config.architecture, len(config.classes)).eval()
    model.load_state_dict(checkpoint.state_dict())
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(config.preprocess.normalise(pixels)))
    return logits.double()


def changed(classifier: Classifier, checkpoint: Path, **fields: Any) -> Classifier:
    opened = load_checkpoint(checkpoint)
    return Classifier.load(Checkpoint(checkpoint, replace(opened.config, **fields)), device="cpu")


def test_probabilities_are_the_models(classifier: Classifier, random_checkpoint: Path) -> None:
    logits = logits_of(load_checkpoint(random_checkpoint), TILES)
    result = classifier.probabilities(TILES)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, logits.softmax(1).numpy(), atol=1e-5)
    # The test would be empty if all images looked alike.
    assert np.ptp(result, axis=0).max() > 0.01


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_company_does_not_matter(classifier: Classifier, batch: int) -> None:
    together = classifier.probabilities(TILES)
    apart = np.concatenate(
        [classifier.probabilities(TILES[i : i + batch]) for i in range(0, len(TILES), batch)]
    )
    np.testing.assert_allclose(apart, together, atol=1e-5)


def test_order_is_kept(classifier: Classifier) -> None:
    order = [3, 0, 6, 2, 5, 1, 4]
    np.testing.assert_allclose(
        classifier.probabilities(TILES[order]), classifier.probabilities(TILES)[order], atol=1e-5
    )


def test_large_batches_are_split(random_checkpoint: Path, classifier: Classifier) -> None:
    small = Classifier.load(random_checkpoint, device="cpu", max_batch=3)
    expected = classifier.probabilities(TILES)
    np.testing.assert_allclose(small.probabilities(TILES), expected, atol=1e-5)


def test_no_images(classifier: Classifier) -> None:
    assert classifier.predict([]) == []
    assert classifier.probabilities(TILES[:0]).shape == (0, 8)


def test_images_and_arrays_agree(classifier: Classifier) -> None:
    large = [Image.fromarray(tile).resize((150, 90)) for tile in TILES]
    arrays = [np.asarray(image) for image in large]
    assert classifier.predict(large) == classifier.predict(arrays)


def test_prediction(classifier: Classifier) -> None:
    prediction = classifier.predict([TILES[0]])[0]
    row = classifier.probabilities(TILES[:1])[0]
    assert list(prediction.probabilities) == list("abcdefgh")
    assert list(prediction.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
    assert prediction.label == "abcdefgh"[row.argmax()]
    assert prediction.probability == max(prediction.probabilities.values())
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    as_json = json.loads(json.dumps(prediction.as_json()))
    assert as_json["label"] == prediction.label
    assert as_json["probability"] == pytest.approx(prediction.probability, rel=1e-5)
    assert as_json["probabilities"] == pytest.approx(prediction.probabilities, rel=1e-5)
    assert list(as_json["probabilities"]) == list("abcdefgh")
    small = Prediction("a", 1.0, {"a": 1.0, "b": 1.23456789e-12})
    assert small.as_json()["probabilities"]["b"] == 1.23457e-12


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "L", "I;16", "CMYK", "F"])
def test_a_pil_image_is_read_as_the_same_file_is(
    mode: str, classifier: Classifier, tmp_path: Path
) -> None:
    """An image that the caller opened takes the same way as one that came as bytes."""
    ramp = np.linspace(0, 1, 90 * 90).reshape(90, 90)
    if mode == "I;16":
        image = Image.fromarray((ramp * 65535).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32))
    else:
        image = Image.fromarray(TILES[0]).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image.tif"
    image.save(path, exif=exif) if mode != "F" else image.save(path)
    expected = classifier.predict([decode(path.read_bytes())])
    with Image.open(path) as opened:
        assert classifier.predict([opened]) == expected


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [None, 2.5])
def test_head_and_temperature(
    head: str, temperature: float | None, classifier: Classifier, random_checkpoint: Path
) -> None:
    logits = logits_of(load_checkpoint(random_checkpoint), TILES) / (temperature or 1)
    expected = logits.softmax(1) if head == "softmax" else logits.sigmoid()
    other = changed(classifier, random_checkpoint, head=head, temperature=temperature)
    np.testing.assert_allclose(other.probabilities(TILES), expected.numpy(), atol=1e-5)


def test_mean_and_std(classifier: Classifier, random_checkpoint: Path) -> None:
    fields = {"mean": (0.8, 0.6, 0.4), "std": (0.1, 0.3, 0.9)}
    other = changed(classifier, random_checkpoint, **fields)
    opened = load_checkpoint(random_checkpoint)
    logits = logits_of(Checkpoint(opened.path, replace(opened.config, **fields)), TILES)  # type: ignore[arg-type]
    np.testing.assert_allclose(other.probabilities(TILES), logits.softmax(1).numpy(), atol=1e-5)


def test_strided_and_read_only_arrays(classifier: Classifier) -> None:
    mirrored = TILES[:, :, ::-1]
    frozen = mirrored.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(
        classifier.probabilities(mirrored), classifier.probabilities(frozen)
    )


@pytest.mark.parametrize(
    "pixels",
    [
        TILES.astype(np.float32),
        TILES[0],
        TILES[:, :32],
        TILES[..., :1],
        TILES.transpose(0, 3, 1, 2),
    ],
)
def test_wrong_pixels(classifier: Classifier, pixels: Any) -> None:
    with pytest.raises(ShapeError, match=r"pixels of shape .* expected \(B, 64, 64, 3\) and uint8"):
        classifier.probabilities(pixels)


@pytest.mark.parametrize(
    "image", [TILES[0].astype(float), TILES, TILES[0, ..., 0], TILES[0][:0], TILES[0][..., :2]]
)
def test_wrong_image(classifier: Classifier, image: Any) -> None:
    with pytest.raises(ShapeError, match=r"image 1 is an array of shape .*\(H, W, 3\) and uint8"):
        classifier.predict([TILES[0], image])


def test_bfloat16_on_the_cpu_is_close(classifier: Classifier, random_checkpoint: Path) -> None:
    other = Classifier.load(random_checkpoint, device="cpu", dtype="bfloat16")
    assert other.describe()["dtype"] == "bfloat16"
    difference = np.abs(other.probabilities(TILES) - classifier.probabilities(TILES)).max()
    assert 0 < difference < 0.1


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def on_each_device(request: pytest.FixtureRequest, random_checkpoint: Path) -> Classifier:
    """In float32, so that a batch changes nothing but the order of sums."""
    return Classifier.load(random_checkpoint, device=request.param, dtype="float32")


def test_any_batch_gives_what_one_by_one_gives(on_each_device: Classifier) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (257, 64, 64, 3), np.uint8)
    alone = np.concatenate([on_each_device.probabilities(pixels[i : i + 1]) for i in range(257)])
    for count in (0, 1, 2, 3, 31, 32, 33, 100, 257):
        got = on_each_device.probabilities(pixels[:count])
        np.testing.assert_allclose(got, alone[:count], atol=2e-6)


def test_two_threads_get_their_own_results(on_each_device: Classifier) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (48, 64, 64, 3), np.uint8)
    expected = on_each_device.probabilities(pixels)
    failures: list[slice] = []

    def work(first: int) -> None:
        for start in range(first, 40, 2):
            part = slice(start, start + 1 + start % 8)
            if not np.allclose(
                on_each_device.probabilities(pixels[part]), expected[part], atol=2e-6
            ):
                failures.append(part)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def check_memory(classifier: Classifier, predictions: int) -> None:
    """Fail where memory grows from one half of many predictions to the other."""
    pixels = np.random.default_rng(3).integers(0, 256, (8, 64, 64, 3), np.uint8)
    process = psutil.Process()
    seen = []
    for turn in range(predictions):
        classifier.probabilities(pixels[: 1 + turn % 8])
        if turn >= predictions // 5 and turn % (predictions // 5) == 0:
            free = torch.cuda.mem_get_info()[0] if classifier.device.type == "cuda" else 0
            seen.append((process.memory_info().rss, -free))
    for before, after in zip(seen[0], seen[-1], strict=True):
        assert after - before < 8 * 2**20, seen


def test_memory_does_not_grow(on_each_device: Classifier) -> None:
    check_memory(on_each_device, 150)


@pytest.mark.soak
def test_memory_does_not_grow_over_ten_thousand(on_each_device: Classifier) -> None:
    check_memory(on_each_device, 10_000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_gpu_agrees(dtype: str, classifier: Classifier, random_checkpoint: Path) -> None:
    other = Classifier.load(random_checkpoint, device="cuda", dtype=dtype)
    other.warm_up()
    difference = np.abs(other.probabilities(TILES) - classifier.probabilities(TILES)).max()
    assert difference < {"auto": 5e-3, "float32": 1e-5, "bfloat16": 3e-2}[dtype]


def test_warm_up_and_describe(classifier: Classifier) -> None:
    classifier.warm_up()
    described = json.loads(json.dumps(classifier.describe()))
    assert described["architecture"] == "mambamic_t"
    assert described["device"] == "cpu"
    assert described["dtype"] == "float32"
    assert described["backend"] == "cpu"
    assert described["classes"] == 8
    assert described["versions"]["torch"] == torch.__version__


def test_reference_backend_agrees(classifier: Classifier, random_checkpoint: Path) -> None:
    other = Classifier.load(random_checkpoint, device="cpu", backend="reference")
    assert other.describe()["backend"] == "reference"
    np.testing.assert_allclose(
        other.probabilities(TILES[:2]), classifier.probabilities(TILES[:2]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "cpu:1"}, "device 'cpu:1'"),
        ({"device": "cuda:x"}, "device 'cuda:x'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        (
            {"backend": "triton"},
            r"^backend 'triton'; expected one of auto, .*, onnxruntime; choose",
        ),
        ({"max_batch": 0}, "max_batch 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, random_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Classifier.load(random_checkpoint, **arguments)


def test_device_that_is_not_here(random_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=r"device 'cuda:99' is not here; .*use device=\"cpu\""):
        Classifier.load(random_checkpoint, device="cuda:99")


def test_auto_device() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert find_device("auto").type == expected


def test_weights_of_another_model(tmp_path: Path) -> None:
    config = Config(architecture="mambamic_t", classes=("a", "b"))
    model = create_model("mambamic_t", 3)
    save_checkpoint(tmp_path / "x", config, model.state_dict(), "")
    with pytest.raises(CheckpointError, match=r"do not fit: key 'head\.bias' has shape \(3,\)"):
        Classifier.load(tmp_path / "x", device="cpu")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_embeddings_are_what_the_head_sees(
    backend: str, classifier: Classifier, random_checkpoint: Path
) -> None:
    tiles = TILES if backend == "auto" else TILES[:1]
    other = Classifier.load(random_checkpoint, device="cpu", backend=backend)
    embeddings = other.embeddings(tiles)
    head = classifier.plain_module().head
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(tiles), head.in_features)
    # The head reads every channel by its place, so that this holds in one order alone.
    chances = head(torch.from_numpy(embeddings)).softmax(1).numpy()
    np.testing.assert_allclose(chances, classifier.probabilities(tiles), atol=1e-5)
    both = other.outputs(tiles)
    np.testing.assert_allclose(both[1], embeddings, atol=1e-5)
    assert embeddings.std() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_gpu_embeddings_agree(dtype: str, classifier: Classifier, random_checkpoint: Path) -> None:
    other = Classifier.load(random_checkpoint, device="cuda", dtype=dtype)
    expected = classifier.embeddings(TILES)
    difference = np.abs(other.embeddings(TILES) - expected).max()
    assert difference < {"auto": 2e-2, "float32": 1e-4}[dtype] * np.abs(expected).max()


def test_the_plain_module_is_the_network(classifier: Classifier) -> None:
    x = torch.from_numpy(classifier.preprocess.normalise(TILES[:2]))
    chances = classifier.plain_module()(x).softmax(1).numpy()
    np.testing.assert_allclose(chances, classifier.probabilities(TILES[:2]), atol=1e-5)
    assert classifier.plain_module() is classifier.plain_module()


def test_the_plain_module_of_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "random")
    classifier = Classifier.load(folder, device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        classifier.plain_module()
