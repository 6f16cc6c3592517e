"""Explanations through the handler, with TorchServe's own parsing around it."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ts.service import Service

from mambamic.handlers.explanations import MAX_IMAGES, Explainer
from mambamic.handlers.parts import Part
from mambamic.handlers.requests import EXPLAIN_SETTINGS, read_request

from .handler_workers import Fields, Worker, as_sent, model_dir, packed, png

__all__ = ["model_dir"]  # a fixture


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[Worker]:
    made = Worker(model_dir)
    yield made
    made.handler.close()


def explain(
    worker: Worker, fields: Fields, accept: str = "*/*", others: tuple[dict[str, Any], ...] = ()
) -> list[tuple[int, str, bytes]]:
    headers = {"explain": "True", "Accept": accept}
    processors, inputs, _ = Service.retrieve_data_for_inference([as_sent(fields, headers), *others])
    context = worker.context
    context.request_processor = processors
    bodies = worker.handler.handle(inputs, context)
    return [
        (
            context.get_response_status(index)[0],
            context.get_response_content_type(index),
            body,
        )
        for index, body in enumerate(bodies)
    ]


def test_one_image_is_answered_with_a_picture(worker: Worker) -> None:
    ((status, content_type, body),) = explain(worker, [("image", "image/png", png(1))])
    assert (status, content_type) == (200, "image/png")
    picture = Image.open(io.BytesIO(body))
    assert picture.format == "PNG"
    assert picture.width >= 64
    assert picture.height > 80


def test_json_on_request_has_the_prediction_and_the_same_picture(worker: Worker) -> None:
    fields = [("image", "image/png", png(1))]
    ((_, _, drawn),) = explain(worker, fields)
    ((status, content_type, body),) = explain(worker, fields, "application/json")
    assert (status, content_type) == (200, "application/json")
    answer = json.loads(body)
    assert base64.b64decode(answer.pop("overlay_png")) == drawn
    assert answer.pop("explained") == answer["label"]
    assert answer.pop("method") == "occlusion"
    assert answer == worker.answer_one(fields)[1]


def test_settings_are_fields_and_not_images(worker: Worker) -> None:
    settings = [("class", "", b"c"), ("method", "text/plain", b"integrated-gradients")]
    for fields in (
        [*settings, ("image", "image/png", png(1))],
        [("body", "image/png", png(1)), *settings],
    ):
        ((status, _, body),) = explain(worker, fields, "application/json")
        assert status == 200
        answer = json.loads(body)
        assert (answer["explained"], answer["method"]) == ("c", "integrated-gradients")
    # A file that happens to have the name of a setting is an image.
    ((status, _, _),) = explain(worker, [("class", "image/png", png(1))])
    assert status == 200


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (("class", b"leucocyte"), "leucocyte"),
        (("method", b"grad-cam"), "mirror image"),
        (("stage", b"two"), "two"),
        (("stage", b"9" * 5000), "stage"),
    ],
)
def test_wrong_settings_are_told(worker: Worker, setting: tuple[str, bytes], named: str) -> None:
    fields = [("image", "image/png", png(1)), (setting[0], "", setting[1])]
    ((status, content_type, body),) = explain(worker, fields)
    assert (status, content_type) == (400, "application/json")
    error = json.loads(body)["error"]
    assert error["code"] == "usage"
    assert named in error["message"]
    assert len(error["message"]) < 500


def test_several_images_are_a_list_and_a_bad_one_harms_no_other(worker: Worker) -> None:
    zipped = packed({"a.png": png(1), "b.png": b"junk"})
    ((status, content_type, body),) = explain(worker, [("tiles", "application/zip", zipped)])
    assert (status, content_type) == (200, "application/json")
    good, bad = json.loads(body)
    assert (good["name"], bad["name"]) == ("a.png", "b.png")
    assert base64.b64decode(good["overlay_png"]).startswith(b"\x89PNG")
    assert bad["error"]["code"] == "decode_failed"


def test_bad_requests_have_the_status_of_their_error(worker: Worker) -> None:
    many = packed({f"{index}.png": png(1) for index in range(MAX_IMAGES + 1)})
    blank = io.BytesIO()
    Image.new("L", (4000, 4000)).save(blank, "PNG")
    for fields, expected in (
        ([], 400),
        ([("class", "", b"c")], 400),
        ([("image", "image/png", b"junk")], 400),
        ([("tiles", "", many)], 413),
        ([("image", "", blank.getvalue())], 413),
    ):
        ((status, content_type, body),) = explain(worker, fields)
        assert (status, content_type) == (expected, "application/json")
        assert "error" in json.loads(body)


def test_predictions_of_the_same_batch_are_answered_as_ever(worker: Worker) -> None:
    prediction = as_sent([("image", "image/png", png(2))], {"explain": "False"})
    drawn, told = explain(worker, [("image", "image/png", png(1))], others=(prediction,))
    assert drawn[:2] == (200, "image/png")
    assert told[:2] == (200, "application/json")
    expected = worker.answer_one([("image", "image/png", png(2))])[1]
    assert json.loads(told[2])["label"] == expected["label"]


def test_images_whose_turn_comes_too_late_are_told_so(worker: Worker) -> None:
    explainer = Explainer(worker.handler._classifier, "cells", "1.0")
    request = read_request([Part("image", "image/png", png(1))], "", EXPLAIN_SETTINGS)
    answer = explainer.answer(request, "*/*", time.monotonic() - 1)
    assert answer.status == 503
    assert answer.body["error"]["code"] == "overloaded"
