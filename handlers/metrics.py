"""What a worker counts and times, request by request.

The metrics themselves are in ``mambamic.metrics``, how they leave the worker is in
``metric_files``. Each series is looked up once: what a request then costs is a few writes to
memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mambamic import metrics
from mambamic.handlers import metric_files
from mambamic.handlers.stamp import HEADER, seconds_since
from mambamic.launcher.probe import MARK

if TYPE_CHECKING:
    from mambamic.classifier import Classifier
    from mambamic.decoding import Timed
    from mambamic.handlers.responses import Answer
    from mambamic.prediction import Prediction

logger = logging.getLogger(__name__)

# Asking the driver takes longer than all the rest together.
GPU_EVERY_S = 1.0


@dataclass(frozen=True)
class Batch:
    """A batch that has begun.

    Args:
        began: On the monotonic clock.
        operations: Per request: ``predict``, ``explain``, ``describe`` or ``probe``.
        waits: Per request, seconds since the edge saw it, None where nobody can tell.
    """

    began: float
    operations: list[str]
    waits: list[float | None]


class ServiceMetrics:
    """The metrics of one worker; one per process.

    Args:
        name: Of the model.
        version: Of the model.
        classifier: What is served.
    """

    def __init__(self, name: str, version: str, classifier: Classifier) -> None:
        self._folder = metric_files.join()
        # Only now: whether its values are shared is settled when it is imported.
        from prometheus_client import CollectorRegistry

        self.registry = CollectorRegistry()
        self._model = (name, version)
        self._request = self._series(metrics.REQUEST_DURATION)
        self._handler = self._series(metrics.HANDLER_DURATION)
        self._answers = self._series(metrics.ANSWERS)
        self._errors = self._series(metrics.ERRORS)
        self._predictions = self._series(metrics.PREDICTIONS)
        self._foreign = self._series(metrics.OUT_OF_DISTRIBUTION)
        self._queue_wait = self._series(metrics.QUEUE_WAIT)[()]
        self._decode = self._series(metrics.DECODE_DURATION)[()]
        self._preprocess = self._series(metrics.PREPROCESS_DURATION)[()]
        self._model_time = self._series(metrics.MODEL_DURATION)[()]
        self._batch_requests = self._series(metrics.BATCH_REQUESTS)[()]
        self._batch_images = self._series(metrics.BATCH_IMAGES)[()]
        self._confidence = self._series(metrics.CONFIDENCE)[()]
        self._in_flight = self._series(metrics.IN_FLIGHT)[()]
        self._begin_at_zero(classifier.config.classes)
        self._state_info(classifier)
        self._gpu = _Gpu(self, classifier) if classifier.device.type == "cuda" else None
        self._series(metrics.WORKER_STARTS)[()].inc()

    def close(self) -> None:
        """Let the worker count as ended."""
        if self._folder is not None:
            self._folder.unregister()

    def begin(self, processors: Sequence[Any]) -> Batch:
        """Note the beginning of a batch.

        Args:
            processors: TorchServe's, one per request, with their headers.
        """
        now = time.time()
        headers = [processor.headers for processor in processors]
        waits = [seconds_since(one.get(HEADER), now) for one in headers]
        self._batch_requests.observe(len(headers))
        for wait in waits:
            if wait is not None:
                self._queue_wait.observe(wait)
        return Batch(time.monotonic(), [_operation(one) for one in headers], waits)

    def end(self, batch: Batch, answers: Sequence[Answer]) -> None:
        """Note that a batch has been answered."""
        seconds = time.monotonic() - batch.began
        for operation, wait, answer in zip(batch.operations, batch.waits, answers, strict=True):
            self._handler[operation,].observe(seconds)
            if wait is not None:
                self._request[operation,].observe(wait + seconds)
            self._answers[operation, str(answer.status)].inc()
            for code in _error_codes(answer.body):
                self._errors[code,].inc()
        self._in_flight.set(0)
        if self._gpu is not None:
            self._gpu.sample()

    def read(self, images: int) -> None:
        """Note that a request with so many images has been read."""
        self._in_flight.inc(images)

    def decoded(self, results: Sequence[Timed]) -> None:
        """Note how long images took; of those that could not be read nothing is noted."""
        for timed in results:
            if not isinstance(timed.result, Exception):
                self._decode.observe(timed.decode_s)
                self._preprocess.observe(timed.preprocess_s)

    def modelled(self, images: int, seconds: float) -> None:
        """Note that images went through the model together."""
        self._batch_images.observe(images)
        self._model_time.observe(seconds)

    def predicted(self, prediction: Prediction) -> None:
        """Note what the model said."""
        self._predictions[prediction.label,].inc()
        self._confidence.observe(prediction.probability)
        if prediction.in_distribution is not None:
            # Also where it is none: the series shows that somebody looks.
            self._foreign[()].inc(0 if prediction.in_distribution else 1)

    def _series(self, metric: metrics.Metric) -> _Series:
        model = self._model if metric.labels[:2] == metrics.MODEL else ()
        return _Series(self._create(metric), model)

    def _create(self, metric: metrics.Metric) -> Any:
        from prometheus_client import Counter, Gauge, Histogram

        stated = (metric.name, metric.help, metric.labels)
        if metric.kind == "histogram":
            return Histogram(*stated, buckets=metric.buckets, registry=self.registry)
        if metric.kind == "gauge":
            mode: Any = metric.mode
            return Gauge(*stated, multiprocess_mode=mode, registry=self.registry)
        return Counter(*stated, registry=self.registry)

    def _begin_at_zero(self, classes: Sequence[str]) -> None:
        # A rate is seen only from the second value of a series on.
        for name in classes:
            self._predictions[name,].inc(0)
        self._answers["predict", "200"].inc(0)
        self._in_flight.set(0)

    def _state_info(self, classifier: Classifier) -> None:
        stated = classifier.describe()
        used = {**stated, **stated["versions"]}
        # Without torch there is no version of it: an empty label counts as none.
        values = [str(used.get(label, "")) for label in metrics.INFO.labels[len(metrics.MODEL) :]]
        self._series(metrics.INFO)[tuple(values)].set(1)


class _Series(dict[tuple[str, ...], Any]):
    """The series of a metric, by the labels that are not the same for the whole worker."""

    def __init__(self, parent: Any, fixed: tuple[str, ...]) -> None:
        super().__init__()
        self._parent = parent
        self._fixed = fixed

    def __missing__(self, key: tuple[str, ...]) -> Any:
        series = self[key] = self._parent.labels(*self._fixed, *key)
        return series


class _Gpu:
    """The memory of the GPU that a worker computes on."""

    def __init__(self, owner: ServiceMetrics, classifier: Classifier) -> None:
        self._device = classifier.device
        name = (str(classifier.device),)
        self._allocated = owner._series(metrics.GPU_ALLOCATED)[name]
        self._reserved = owner._series(metrics.GPU_RESERVED)[name]
        self._used = owner._series(metrics.GPU_USED)[name]
        self._total = owner._series(metrics.GPU_TOTAL)[name]
        self._next = 0.0
        self.sample()

    def sample(self) -> None:
        """Take the figures anew, unless they are fresh."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + GPU_EVERY_S
        from torch import cuda

        try:
            free, total = cuda.mem_get_info(self._device)
        except RuntimeError:
            # The figures of before stay; answers do not fail for want of new ones.
            logger.exception("the GPU does not tell how much memory it has")
            return
        self._allocated.set(cuda.memory_allocated(self._device))
        self._reserved.set(cuda.memory_reserved(self._device))
        self._used.set(total - free)
        self._total.set(total)


def _operation(headers: dict[str, str]) -> str:
    # The frontend states "explain" for all that comes by the port of predictions.
    if headers.get("explain") == "True":
        return "explain"
    if headers.get("describe") == "True" and "explain" not in headers:
        return "describe"
    return "probe" if MARK in headers else "predict"


def _error_codes(body: Any) -> Iterator[str]:
    """Yield the code of each error object in an answer."""
    for part in body if isinstance(body, list) else [body]:
        if isinstance(part, dict) and "error" in part:
            yield part["error"]["code"]
