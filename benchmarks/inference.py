"""Time ``Classifier.probabilities`` from uint8 pixels on the host to probabilities on the host."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.common import write
from mambamic import Classifier


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    classifier = Classifier.load(
        args.checkpoint, device=args.device, dtype=args.dtype, max_batch=max(args.batches)
    )
    size = classifier.config.input_size
    rows = []
    for batch in args.batches:
        pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
        times = []
        for repeat in range(args.repeats + 3):
            begun = time.perf_counter()
            classifier.probabilities(pixels)
            if repeat >= 3:  # the first ones warm up
                times.append(time.perf_counter() - begun)
        median = statistics.median(times)
        rows.append(
            {
                "batch": batch,
                "median_ms": round(median * 1e3, 2),
                "p99_ms": round(sorted(times)[int(0.99 * (len(times) - 1))] * 1e3, 2),
                "images_per_second": round(batch / median, 1),
            }
        )
    write({"inference": classifier.describe(), "repeats": args.repeats, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
