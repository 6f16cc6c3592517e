from __future__ import annotations

import io
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambamic import Classifier
from mambamic.engine import TorchEngine
from mambamic.handlers.gate import VARIABLE, Gate
from mambamic.prediction import Prediction

from .handler_workers import (
    Worker,
    as_sent,
    before_the_network,
    model_dir,
    packed,
    png,
    worker,
)
from .random_checkpoint import CLASSES

__all__ = ["model_dir", "worker"]  # fixtures


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
