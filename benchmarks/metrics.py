"""What the metrics cost a request: the handler's calls, without the work between them."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import write
from mambamic import Classifier
from mambamic.decoding import Timed
from mambamic.handlers.metric_files import FOLDER_VARIABLE, PORT_VARIABLE
from mambamic.handlers.metrics import ServiceMetrics
from mambamic.handlers.responses import Answer
from mambamic.prediction import Prediction


class Processor:
    """A request, as far as the metrics look at it."""

    def __init__(self, stamp: str) -> None:
        self.headers = {"explain": "False", "x-request-start": stamp}


def seconds(metrics: ServiceMetrics, label: str, requests: int) -> float:
    """Return what one batch of single images costs."""
    processors = [Processor(f"t={time.time() - 0.02:.3f}") for _ in range(requests)]
    decoded = [Timed(np.zeros(1, np.uint8), 0.002, 0.001)] * requests
    answers = [Answer({"label": label})] * requests
    prediction = Prediction(label, 0.9, {}, ood_score=0.5)
    began = time.perf_counter()
    batch = metrics.begin(processors)
    for _ in range(requests):
        metrics.read(1)
    metrics.decoded(decoded)
    metrics.modelled(requests, 0.015)
    for _ in range(requests):
        metrics.predicted(prediction)
    metrics.end(batch, answers)
    return time.perf_counter() - began


def main() -> None:
    """Time batches of several sizes, in multi-process mode as under a launcher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    classifier = Classifier.load(args.checkpoint, device="cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {FOLDER_VARIABLE: folder, PORT_VARIABLE: "0"}
        metrics = ServiceMetrics("cells", "1.0", classifier)
        for requests in (1, 32):
            label = classifier.config.classes[0]
            times = [seconds(metrics, label, requests) for _ in range(args.repeats)]
            each = [value / requests * 1e6 for value in times]
            rows.append(
                {
                    "requests_per_batch": requests,
                    "microseconds_per_request_p50": round(statistics.median(each), 1),
                    "microseconds_per_request_p99": round(statistics.quantiles(each, n=100)[98], 1),
                }
            )
        metrics.close()
    write({"checkpoint": args.checkpoint.name, "repeats": args.repeats, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
