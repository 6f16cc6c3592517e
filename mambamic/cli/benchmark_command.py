"""``mambamic benchmark``: how fast this machine is, and how far from what it could be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mambamic.backends import SCAN_BACKENDS
from mambamic.benchmark.report import lines
from mambamic.benchmark.suite import MODELS, PARTS, Options, Suite
from mambamic.benchmark.timing import Timing
from mambamic.classifier import DTYPES
from mambamic.cli.arguments import positive
from mambamic.errors import UsageError

DESCRIPTION = """\
Measure throughput (a stream of batches) and latency (one image) from uint8 pixels on the host to
probabilities on the host, the scan alone, and training steps. Prints a table with the distance from
the floors that the device sets, and beside it the published code's figures where this is the kind
of GPU they were measured on. docs/benchmark.md says what is counted.

example:
  mambamic benchmark
  mambamic benchmark runs/cells/checkpoint --only throughput latency --batches 1 32 256
  mambamic benchmark mambamic_t --device cpu --out cpu.json

exit status: 0 all measured, 1 something failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic benchmark``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("models", nargs="*", default=MODELS, metavar="MODEL",
        help="variants, which get random weights, or checkpoint folders "
             f"(default: {' '.join(MODELS)})")  # fmt: skip
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="measure only these")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--backend", default="auto", choices=SCAN_BACKENDS, help="of the scan (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="default: %(default)s")
    add("--batches", type=positive, nargs="+", metavar="N",
        help="of the throughput (default: 1 32 128 256 on a GPU, 1 8 on a CPU)")  # fmt: skip
    add("--scan-images", type=positive, metavar="N",
        help="of the scans (default: 128 on a GPU, 1 on a CPU)")  # fmt: skip
    add("--training-batch", type=positive, metavar="N",
        help="of a training step (default: 256 on a GPU, 8 on a CPU)")  # fmt: skip
    add("--warmup", type=positive, default=5, metavar="N", help="runs before (default: 5)")
    add("--repeats", type=positive, default=20, metavar="N", help="runs (default: 20)")
    add("--out", type=Path, metavar="FILE", help="write the record there, as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and write the record; return 1 if anything failed."""
    if args.out is not None and not args.out.parent.is_dir():
        raise UsageError(f"--out {args.out}", "a file in an existing folder", "create the folder")
    options = Options(
        models=tuple(args.models),
        parts=tuple(args.only),
        device=args.device,
        backend=args.backend,
        dtype=args.dtype,
        batches=tuple(args.batches) if args.batches else None,
        scan_images=args.scan_images,
        training_batch=args.training_batch,
        timing=Timing(args.warmup, args.repeats),
    )
    record = Suite(options).run()
    print("\n".join(lines(record)))
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if record["failed"] else 0
