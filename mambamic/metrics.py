"""The metrics of a server: their names, labels and buckets, in one place.

The handler records them, ``docs/metrics.md`` lists them, the rules and the dashboard in
``monitoring/`` ask for them. Names and units follow Prometheus' conventions: base units in the
name, ``_total`` for counters.
"""

from __future__ import annotations

from dataclasses import dataclass

# Three to eight in each factor of ten, so that a percentile that is interpolated within one is
# off by a fifth at most. Phases on a GPU take less than a millisecond.
SECONDS = (
    *(0.00025, 0.0005, 0.00075),
    *(0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0065, 0.008),
    *(0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8),
    *(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0),
    *(10.0, 15.0, 20.0, 30.0),
)
REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)

MODEL = ("model", "version")
OPERATION = (*MODEL, "operation")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: Without the suffix that the text format adds to counters.
        help: One line, for people.
        labels: Their names.
        buckets: Of a histogram, the upper bounds.
        mode: Of a gauge, how the values of several workers become one; none of them outlives its
            worker.
    """

    name: str
    help: str
    labels: tuple[str, ...] = MODEL
    buckets: tuple[float, ...] = ()
    mode: str = ""

    @property
    def kind(self) -> str:
        """``histogram``, ``gauge`` or ``counter``."""
        return "histogram" if self.buckets else "gauge" if self.mode else "counter"

    @property
    def sample(self) -> str:
        """The name by which a query finds it; a histogram has three, with suffixes of their own."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


REQUEST_DURATION = Metric(
    "mambamic_request_duration_seconds",
    "From the edge's stamp to the answer; only of requests with a stamp",
    OPERATION,
    SECONDS,
)
QUEUE_WAIT = Metric(
    "mambamic_queue_wait_seconds",
    "From the edge's stamp until a worker began the request; only of requests with a stamp",
    buckets=SECONDS,
)
HANDLER_DURATION = Metric(
    "mambamic_handler_duration_seconds",
    "From the moment that a worker has a request, with the others of its batch, to the answer",
    OPERATION,
    SECONDS,
)
DECODE_DURATION = Metric(
    "mambamic_decode_duration_seconds", "Decoding one image file", buckets=SECONDS
)
PREPROCESS_DURATION = Metric(
    "mambamic_preprocess_duration_seconds",
    "Bringing one decoded image to the model's size",
    buckets=SECONDS,
)
MODEL_DURATION = Metric(
    "mambamic_model_duration_seconds", "One pass of images through the model", buckets=SECONDS
)
BATCH_REQUESTS = Metric(
    "mambamic_batch_requests", "Requests that a worker was given together", buckets=REQUESTS
)
BATCH_IMAGES = Metric(
    "mambamic_batch_images", "Images that went through the model together", buckets=IMAGES
)
ANSWERS = Metric(
    "mambamic_requests",
    "Requests that were answered, by HTTP status",
    (*OPERATION, "status"),
)
ERRORS = Metric(
    "mambamic_errors",
    "Errors in answers, by code: one for a request that failed, else one for each failed image",
    (*MODEL, "reason"),
)
PREDICTIONS = Metric(
    "mambamic_predictions", "Images that were classified, by predicted class", (*MODEL, "class")
)
CONFIDENCE = Metric(
    "mambamic_prediction_confidence", "Probability of the predicted class", buckets=SHARES
)
OUT_OF_DISTRIBUTION = Metric(
    "mambamic_out_of_distribution",
    "Predictions on images of another kind; only where the checkpoint has a detector",
)
IN_FLIGHT = Metric(
    "mambamic_images_in_flight", "Images that workers have read and not answered", mode="livesum"
)
WORKER_STARTS = Metric("mambamic_worker_starts", "Workers that have loaded the model")
GPU_ALLOCATED = Metric(
    "mambamic_gpu_memory_allocated_bytes",
    "GPU memory that the workers' tensors fill",
    (*MODEL, "device"),
    mode="livesum",
)
GPU_RESERVED = Metric(
    "mambamic_gpu_memory_reserved_bytes",
    "GPU memory that the workers hold, filled or not",
    (*MODEL, "device"),
    mode="livesum",
)
GPU_USED = Metric(
    "mambamic_gpu_memory_used_bytes",
    "GPU memory in use, by whichever process",
    ("device",),
    mode="livemostrecent",
)
GPU_TOTAL = Metric(
    "mambamic_gpu_memory_total_bytes", "GPU memory that there is", ("device",), mode="livemax"
)
INFO = Metric(
    "mambamic_info",
    "Always 1; its labels say what is in use",
    (
        *MODEL,
        *("architecture", "backend", "device", "device_name", "dtype", "graph"),
        *("mambamic", "torch", "python"),
    ),
    mode="livemax",
)

ALL = (
    REQUEST_DURATION,
    QUEUE_WAIT,
    HANDLER_DURATION,
    DECODE_DURATION,
    PREPROCESS_DURATION,
    MODEL_DURATION,
    BATCH_REQUESTS,
    BATCH_IMAGES,
    ANSWERS,
    ERRORS,
    PREDICTIONS,
    CONFIDENCE,
    OUT_OF_DISTRIBUTION,
    IN_FLIGHT,
    WORKER_STARTS,
    GPU_ALLOCATED,
    GPU_RESERVED,
    GPU_USED,
    GPU_TOTAL,
    INFO,
)
