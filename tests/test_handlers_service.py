from __future__ import annotations

import io
import json
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ts.context import Context
from ts.service import Service

from mambamic import Classifier
from mambamic.engine import TorchEngine
from mambamic.errors import CheckpointError, UsageError
from mambamic.export.archive import write_archive
from mambamic.handlers.gate import VARIABLE, Gate
from mambamic.handlers.service import ImageClassifier
from mambamic.prediction import Prediction

from .random_checkpoint import CLASSES

Fields = list[tuple[str, str, bytes]]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def as_sent(fields: Fields, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What TorchServe's worker reads from its socket for one request."""
    return {
        "requestId": b"id",
        "headers": [
            {"name": name.encode(), "value": value.encode()}
            for name, value in (headers or {}).items()
        ],
        "parameters": [
            {"name": name, "contentType": content_type, "value": bytearray(value)}
            for name, content_type, value in fields
        ],
    }


class Worker:
    """The handler with TorchServe's own context and request parsing around it."""

    def __init__(self, model_dir: Path, gpu: int | None = None, **settings: object) -> None:
        manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())
        config = yaml.safe_load((model_dir / "model-config.yaml").read_text()) | settings
        self.context = Context(
            "cells", str(model_dir), manifest, 32, gpu, "0.12.0", model_yaml_config=config
        )
        self.handler = ImageClassifier()
        self.handler.initialize(self.context)

    def answer(self, *requests: dict[str, Any]) -> list[tuple[int, Any]]:
        processors, inputs, _ = Service.retrieve_data_for_inference(list(requests))
        self.context.request_processor = processors
        bodies = self.handler.handle(inputs, self.context)
        assert len(bodies) == len(requests)
        for index in range(len(requests)):
            assert self.context.get_response_content_type(index) == "application/json"
        return [
            (self.context.get_response_status(index)[0], json.loads(body))
            for index, body in enumerate(bodies)
        ]

    def answer_one(self, fields: Fields) -> tuple[int, Any]:
        return self.answer(as_sent(fields))[0]


@pytest.fixture(scope="module")
def model_dir(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    archive = write_archive(
        random_checkpoint, folder.parent / "cells.mar", model_name="cells", version="2.1"
    )
    with zipfile.ZipFile(archive) as packed_model:
        packed_model.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        made = Worker(model_dir)
    yield made
    made.handler.close()


def test_one_image_gets_the_answer_of_the_library(worker: Worker, random_checkpoint: Path) -> None:
    status, body = worker.answer_one([("image", "image/png", png(1))])
    image = Image.open(io.BytesIO(png(1)))
    (prediction,) = Classifier.load(random_checkpoint, device="cpu").predict([image])
    assert status == 200
    assert body.pop("model") == "cells"
    assert body.pop("version") == "2.1"
    assert body == prediction.as_json()
    assert set(body["probabilities"]) == set(CLASSES)


def test_each_request_of_a_batch_has_its_own_status(worker: Worker) -> None:
    answers = worker.answer(
        as_sent([("image", "image/png", png(1))]),
        as_sent([("image", "image/png", b"not an image")]),
        as_sent([]),
        as_sent([("body", "text/plain", b"hello")]),
        as_sent([("image", "image/png", png(2))]),
    )
    assert [status for status, _ in answers] == [200, 400, 400, 415, 200]
    assert ["error" in body for _, body in answers] == [False, True, True, True, False]
    assert answers[1][1]["error"]["code"] == "decode_failed"


def test_bad_tiles_among_several_are_error_objects(worker: Worker) -> None:
    status, body = worker.answer_one(
        [("a", "image/png", png(1)), ("b", "image/png", b"junk"), ("c", "image/png", png(2))]
    )
    assert status == 200
    assert [entry["name"] for entry in body] == ["a", "b", "c"]
    assert ["error" in entry for entry in body] == [False, True, False]
    alone = worker.answer_one([("image", "image/png", png(2))])[1]
    assert body[2]["label"] == alone["label"]
    for name, probability in alone["probabilities"].items():
        assert body[2]["probabilities"][name] == pytest.approx(probability, abs=1e-6)


def test_it_fails_only_if_every_tile_did(worker: Worker) -> None:
    status, body = worker.answer_one([("a", "", b"junk"), ("b", "", b"junk")])
    assert status == 400
    assert [entry["error"]["code"] for entry in body] == ["decode_failed"] * 2


def test_a_zip_of_more_tiles_than_one_part(worker: Worker) -> None:
    files = {f"tile{index}.png": png(index % 3) for index in range(130)}
    files["tile77.png"] = b"junk"
    status, body = worker.answer_one([("image", "application/zip", packed(files))])
    assert status == 200
    assert [entry["name"] for entry in body] == list(files)
    assert [index for index, entry in enumerate(body) if "error" in entry] == [77]
    assert body[0]["probabilities"] == pytest.approx(body[129]["probabilities"], abs=1e-5)


def test_repeated_fields_are_refused(worker: Worker) -> None:
    status, body = worker.answer_one([("image", "", png(1)), ("image", "", png(2))])
    assert status == 400
    assert "'image'" in body["error"]["message"]
    assert "ZIP" in body["error"]["message"]


def test_it_describes_itself(worker: Worker) -> None:
    ((status, body),) = worker.answer(as_sent([], {"describe": "True"}))
    assert status == 200
    assert (body["model"], body["version"], body["device"]) == ("cells", "2.1", "cpu")
    assert body["backend"] == worker.handler._classifier.backend


def test_what_came_by_the_port_of_predictions_is_not_answered_with_versions(
    worker: Worker,
) -> None:
    # The frontend adds "explain" to these, whatever the client sent; see tests/e2e.
    headers = {"explain": "False", "describe": "True"}
    (empty, image) = worker.answer(
        as_sent([("body", "", b"")], headers), as_sent([("image", "", png(1))], headers)
    )
    assert empty[0] == 400
    assert image[0] == 200
    assert "label" in image[1]


@contextmanager
def before_the_network(worker: Worker, work: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call something with each batch of pixels that goes into the network."""
    engine = worker.handler._classifier._engine
    assert isinstance(engine, TorchEngine)
    network = engine.network

    def both(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        work(pixels)
        return network(pixels)

    engine.network = both
    try:
        yield
    finally:
        engine.network = network


@pytest.mark.parametrize(("largest", "answered"), [(4, 200), (3, 500)])
def test_after_running_out_of_memory_each_half_is_tried_once(
    worker: Worker, largest: int, answered: int, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []

    def run_out(pixels: torch.Tensor) -> None:
        sizes.append(len(pixels))
        if len(pixels) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with before_the_network(worker, run_out):
        request = as_sent([("image", "image/png", png(1))])
        answers = worker.answer(*[request] * 7, as_sent([("image", "", b"junk")]))
    assert sizes == [7, 4, 3]
    # Of seven the halves have four and three.
    assert [status for status, _ in answers] == [answered] * 4 + [200] * 3 + [400]
    if answered == 500:
        assert answers[0][1]["error"]["code"] == "inference_failed"
    assert "out of memory" in caplog.text
    assert worker.answer_one([("image", "image/png", png(1))])[0] == 200


def test_probabilities_that_are_no_numbers_are_an_error(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = worker.handler._classifier._engine
    assert isinstance(engine, TorchEngine)
    network = engine.network

    def spoil(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = network(pixels)
        logits[0] = torch.nan
        return logits, features

    monkeypatch.setattr(engine, "network", spoil)
    answers = worker.answer(*[as_sent([("image", "image/png", png(1))])] * 2)
    monkeypatch.undo()
    assert [status for status, _ in answers] == [500, 200]


def test_what_a_batch_has_no_time_for_is_told_so(model_dir: Path) -> None:
    worker = Worker(model_dir, responseTimeout=2)
    zipped = packed({f"{index}.png": png(0)[:60] for index in range(62)} | {"good.png": png(0)})
    larger = packed({f"{index}.png": png(0) for index in range(64)})
    sizes = []

    def slow(pixels: torch.Tensor) -> None:
        sizes.append(len(pixels))
        time.sleep(1.1)

    with before_the_network(worker, slow):
        late, first, single = worker.answer(
            as_sent([("image", "", larger)]),
            as_sent([("image", "", zipped)]),
            as_sent([("image", "", png(1))]),
        )
    assert sizes == [2]
    assert late[0] == 503
    assert late[1]["error"]["code"] == "overloaded"
    assert "later" in late[1]["error"]["message"]
    assert (first[0], single[0]) == (200, 200)
    assert "label" in first[1][-1]
    assert worker.answer_one([("image", "", larger)])[0] == 200
    worker.handler.close()


def test_the_zips_of_a_batch_are_not_expanded_all_at_once(worker: Worker) -> None:
    size = 70 * 2**20
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("junk", bytes(size))
    request = as_sent([("image", "", buffer.getvalue())])
    peaks = []
    for number in (1, 4):
        tracemalloc.start()
        answers = worker.answer(*[request] * number)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [status for status, _ in answers] == [400] * number
    assert peaks[1] < peaks[0] + size / 2


def test_several_tiles_of_several_requests_share_a_batch(worker: Worker) -> None:
    sizes = []

    def note(pixels: torch.Tensor) -> None:
        sizes.append(len(pixels))

    with before_the_network(worker, note):
        pair = [("a", "", png(1)), ("b", "", png(2))]
        answers = worker.answer(*[as_sent(pair)] * 4, *[as_sent(pair[:1])] * 5)
    assert sizes == [13]
    assert [len(body) for _, body in answers[:4]] == [2] * 4


def test_a_readiness_check_is_a_prediction_that_does_not_count(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Prediction] = []
    monkeypatch.setattr(worker.handler._metrics, "predicted", counted.append)
    image = as_sent([("image", "image/png", png(1))])
    (status, body), _ = worker.answer(as_sent([], {"X-Mambamic-Probe": "1"}), image)
    assert status == 200
    assert body["probability"] == max(body["probabilities"].values())
    assert len(counted) == 1


def test_the_ids_of_requests_are_logged_with_their_end(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mambamic.handlers.service")
    worker.answer(
        as_sent([("image", "image/png", png(1))], {"X-Request-ID": "lab-1"}),
        as_sent([("image", "image/png", b"no image")], {"X-Request-Id": "lab-2"}),
        as_sent([("image", "image/png", png(1))], {"X-Request-ID": "two\nlines"}),
        as_sent([("image", "image/png", png(1))]),
    )
    told = [record.getMessage() for record in caplog.records if "answered" in record.getMessage()]
    assert told == ["answered lab-1=200 lab-2=400"]


def test_a_gpu_that_torch_does_not_find_is_not_taken(model_dir: Path) -> None:
    worker = Worker(model_dir, gpu=0)
    found = worker.handler._classifier.device
    assert str(found) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert worker.answer_one([("image", "", png(1))])[0] == 200
    worker.handler.close()


def test_a_stopping_server_refuses(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    worker = Worker(model_dir)
    try:
        assert worker.answer_one([("image", "image/png", png(1))])[0] == 200
        Gate(tmp_path).close()
        status, body = worker.answer_one([("image", "image/png", png(1))])
        assert (status, body["error"]["code"]) == (503, "unavailable")
    finally:
        worker.handler.close()


@pytest.mark.parametrize("version", ["0.0.9", "0.99.0", "1.0.0"])
def test_an_archive_of_another_version_is_refused(
    model_dir: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambamic.handlers.service.__version__", "0.1.7")
    with pytest.raises(CheckpointError, match=version):
        _initialize(model_dir, {"version": version})


@pytest.mark.parametrize("section", [None, {}, "0.1.0"])
def test_an_archive_without_a_version_is_refused(model_dir: Path, section: object) -> None:
    with pytest.raises(CheckpointError, match="mambamic archive"):
        _initialize(model_dir, section)


@pytest.mark.parametrize("decoders", [-1, "4", 1.5, True])
def test_decoders_must_be_a_number(model_dir: Path, decoders: object) -> None:
    with pytest.raises(UsageError, match="decoders"):
        _initialize(model_dir, {"version": "0.1.0", "decoders": decoders})


def test_tiles_are_decoded_in_processes_where_asked_for(model_dir: Path) -> None:
    config = {"version": _written_version(model_dir), "decoders": 1}
    context = Context(
        "cells",
        str(model_dir),
        {"model": {}},
        32,
        None,
        "0",
        model_yaml_config={"mambamic": config},
    )
    handler = ImageClassifier()
    handler.initialize(context)
    try:
        processors, inputs, _ = Service.retrieve_data_for_inference(
            [as_sent([("image", "image/png", png(1))]), as_sent([("image", "", b"junk")])]
        )
        context.request_processor = processors
        good, bad = (json.loads(body) for body in handler.handle(inputs, context))
        assert good["label"] in CLASSES
        assert bad["error"]["code"] == "decode_failed"
    finally:
        handler.close()


def _written_version(model_dir: Path) -> str:
    config = yaml.safe_load((model_dir / "model-config.yaml").read_text())
    return str(config["mambamic"]["version"])


def _initialize(model_dir: Path, section: object) -> None:
    config = {"mambamic": section}
    context = Context(
        "cells", str(model_dir), {"model": {}}, 1, None, "0", model_yaml_config=config
    )
    ImageClassifier().initialize(context)


def test_an_embedding_comes_where_it_is_asked_for(worker: Worker) -> None:
    image = ("image", "image/png", png(1))
    answers = worker.answer(
        as_sent([image, ("embedding", "", b"1")]),
        as_sent([("embedding", "text/plain", b"true"), image]),
        as_sent([image, ("embedding", "", b"0")]),
        as_sent([image, ("embedding", "", b"perhaps")]),
        as_sent([("a", "", png(1)), ("b", "", b"junk"), ("embedding", "", b"1")]),
    )
    assert [status for status, _ in answers] == [200, 200, 200, 400, 200]
    pixels = worker.handler._classifier.preprocess.pixels(Image.open(io.BytesIO(png(1))))
    (expected,) = worker.handler._classifier.embeddings(pixels[np.newaxis])
    tile, failed = answers[4][1]
    for body in (answers[0][1], answers[1][1], tile):
        np.testing.assert_allclose(body["embedding"], expected, rtol=1e-3, atol=1e-4)
    assert "embedding" not in answers[2][1]
    assert "0 or 1" in answers[3][1]["error"]["message"]
    assert failed["error"]["code"] == "decode_failed"
