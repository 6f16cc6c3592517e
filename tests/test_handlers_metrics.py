from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mambamic import Classifier, metrics
from mambamic.decoding import Timed
from mambamic.errors import DecodeError, RequestError
from mambamic.handlers.metrics import ServiceMetrics
from mambamic.handlers.responses import Answer, error_answer, list_answer
from mambamic.prediction import Prediction

from .random_checkpoint import CLASSES

BAD = DecodeError("it", "another", "do")


class Processor:
    """A request as TorchServe hands it over."""

    def __init__(self, **headers: str) -> None:
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Recorded:
    """Metrics, and what they say."""

    def __init__(self, classifier: Classifier) -> None:
        self.recorder = ServiceMetrics("cells", "2.1", classifier)

    def batch(self, *pairs: tuple[Processor, Answer]) -> None:
        begun = self.recorder.begin([processor for processor, _ in pairs])
        self.recorder.end(begun, [answer for _, answer in pairs])

    def value(self, metric: metrics.Metric, suffix: str = "", **labels: str) -> float | None:
        model = {"model": "cells", "version": "2.1"} if "model" in metric.labels else {}
        name = f"{metric.name}{suffix}" if suffix else metric.sample
        return self.recorder.registry.get_sample_value(name, {**model, **labels})


@pytest.fixture(scope="module")
def classifier(random_checkpoint: Path) -> Classifier:
    return Classifier.load(random_checkpoint, device="cpu")


@pytest.fixture
def recorded(classifier: Classifier) -> Iterator[Recorded]:
    made = Recorded(classifier)
    yield made
    made.recorder.close()


def test_a_stamp_gives_the_whole_and_the_wait(recorded: Recorded) -> None:
    stamp = f"t={time.time() - 2:.3f}"
    recorded.batch((Processor(explain="False", x_request_start=stamp), Answer({})))
    wait = recorded.value(metrics.QUEUE_WAIT, "_sum")
    whole = recorded.value(metrics.REQUEST_DURATION, "_sum", operation="predict")
    handler = recorded.value(metrics.HANDLER_DURATION, "_sum", operation="predict")
    assert wait is not None
    assert whole is not None
    assert handler is not None
    assert wait >= 1.9
    assert whole == pytest.approx(wait + handler)


@pytest.mark.parametrize("stamp", [{}, {"x_request_start": "t=17"}])
def test_without_a_stamp_the_wait_is_unknown_and_not_0(
    recorded: Recorded, stamp: dict[str, str]
) -> None:
    recorded.batch((Processor(explain="False", **stamp), Answer({})))
    assert recorded.value(metrics.QUEUE_WAIT, "_count") == 0
    assert recorded.value(metrics.REQUEST_DURATION, "_count", operation="predict") is None
    assert recorded.value(metrics.HANDLER_DURATION, "_count", operation="predict") == 1


def test_operations_are_told_apart(recorded: Recorded) -> None:
    recorded.batch(
        (Processor(explain="False"), Answer({})),
        # What a client sends is no more than a header.
        (Processor(explain="False", describe="True"), Answer({})),
        (Processor(explain="True"), Answer(b"png")),
        (Processor(describe="True"), Answer({})),
        (Processor(explain="False", x_mambamic_probe="1"), Answer({})),
    )
    counts = [
        recorded.value(metrics.ANSWERS, operation=operation, status="200")
        for operation in ("predict", "explain", "describe", "probe")
    ]
    assert counts == [2, 1, 1, 1]
    assert recorded.value(metrics.BATCH_REQUESTS, "_sum") == 5


def test_errors_are_counted_by_code_one_for_each_object(recorded: Recorded) -> None:
    good: dict[str, Any] = {"label": "a"}
    asked = Processor(explain="False")
    recorded.batch(
        (asked, Answer(good)),
        (asked, error_answer(RequestError("it", "another", "do"))),
        (asked, list_answer(["a", "b", "c"], [good, BAD, BAD])),
        (asked, list_answer(["a"], [BAD])),
    )
    assert recorded.value(metrics.ERRORS, reason="bad_request") == 1
    assert recorded.value(metrics.ERRORS, reason="decode_failed") == 3
    assert recorded.value(metrics.ANSWERS, operation="predict", status="200") == 2
    assert recorded.value(metrics.ANSWERS, operation="predict", status="400") == 2


def test_images_are_in_flight_until_the_batch_is_answered(recorded: Recorded) -> None:
    batch = recorded.recorder.begin([Processor(), Processor()])
    recorded.recorder.read(3)
    recorded.recorder.read(1)
    assert recorded.value(metrics.IN_FLIGHT) == 4
    recorded.recorder.end(batch, [Answer({}), Answer({})])
    assert recorded.value(metrics.IN_FLIGHT) == 0


def test_phases(recorded: Recorded) -> None:
    recorded.recorder.decoded([Timed(BAD), Timed(torch.zeros(1).numpy(), 0.25, 0.5)])
    recorded.recorder.modelled(5, 0.125)
    assert recorded.value(metrics.DECODE_DURATION, "_count") == 1
    assert recorded.value(metrics.DECODE_DURATION, "_sum") == 0.25
    assert recorded.value(metrics.PREPROCESS_DURATION, "_sum") == 0.5
    assert recorded.value(metrics.MODEL_DURATION, "_sum") == 0.125
    assert recorded.value(metrics.BATCH_IMAGES, "_sum") == 5


def test_predictions_and_what_the_detector_says(recorded: Recorded) -> None:
    def predict(label: str, score: float | None) -> None:
        recorded.recorder.predicted(Prediction(label, 0.75, {}, ood_score=score))

    assert [recorded.value(metrics.PREDICTIONS, **{"class": name}) for name in CLASSES] == [0] * 8
    predict("b", None)
    # Where nobody looks nothing is said of images of another kind.
    assert recorded.value(metrics.OUT_OF_DISTRIBUTION) is None
    predict("b", 0.5)
    assert recorded.value(metrics.OUT_OF_DISTRIBUTION) == 0
    predict("c", 1.5)
    assert recorded.value(metrics.OUT_OF_DISTRIBUTION) == 1
    assert recorded.value(metrics.PREDICTIONS, **{"class": "b"}) == 2
    assert recorded.value(metrics.CONFIDENCE, "_sum") == 2.25


def test_it_says_what_is_in_use(recorded: Recorded, classifier: Classifier) -> None:
    stated = classifier.describe()
    names = metrics.INFO.labels[len(metrics.MODEL) :]
    used = {name: str({**stated, **stated["versions"]}[name]) for name in names}
    assert used["backend"] == classifier.backend
    assert recorded.value(metrics.INFO, **used) == 1
    assert recorded.value(metrics.WORKER_STARTS) == 1


@pytest.mark.gpu
def test_gpu_memory(random_checkpoint: Path) -> None:
    on_gpu = Classifier.load(random_checkpoint, device="cuda")
    recorded = Recorded(on_gpu)
    recorded.recorder.close()
    device = str(on_gpu.device)
    allocated, reserved, used, total = (
        recorded.value(metric, device=device)
        for metric in (
            metrics.GPU_ALLOCATED,
            metrics.GPU_RESERVED,
            metrics.GPU_USED,
            metrics.GPU_TOTAL,
        )
    )
    assert allocated is not None
    assert reserved is not None
    assert used is not None
    assert total is not None
    assert 0 < allocated <= reserved <= used < total
    assert math.isclose(
        total, torch.cuda.get_device_properties(on_gpu.device).total_memory, rel_tol=0.1
    )
