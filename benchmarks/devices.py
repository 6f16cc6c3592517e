"""How much faster several devices train than one: whole runs of the same recipe and batch size.

Each run is ``mambamic train`` for a few epochs of full size. An epoch's rate is what the run logs;
the first, in which kernels are compiled and captured, does not count.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import write
from mambamic.training.fit import LOG, RATE


def trained(data: Path, arch: str, batch: int, devices: int, epochs: int) -> dict[str, Any]:
    """Train in a process of its own, and return the rates of its epochs and what it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "mambamic", "train", str(data), "--arch", arch, "--quiet"]
        recipe = {"batch-size": batch, "epochs": epochs, "warmup-epochs": 1, "early-share": 0}
        options = [f"--{name}={value}" for name, value in recipe.items()]
        subprocess.run([*call, *options, f"--devices={devices}", f"--out={folder}/run"], check=True)
        with Path(folder, "run", LOG, "version_0/metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    rates = [float(row[RATE]) for row in rows if row[RATE]]
    return {
        "devices": devices,
        "batch": batch,
        "images_per_second": round(statistics.median(rates[1:])),
        "by_epoch": [round(rate) for rate in rates],
        "val_accuracy": [round(float(r["val_accuracy"]), 4) for r in rows if r["val_accuracy"]],
    }


def main() -> None:
    """Train with one device and with several, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arch", default="mambamic_t")
    parser.add_argument("--batches", type=int, nargs="+", default=[256])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows, speedups = [], {}
    for batch in args.batches:
        runs = [trained(args.data, args.arch, batch, n, args.epochs) for n in args.devices]
        rows += runs
        first, last = runs[0]["images_per_second"], runs[-1]["images_per_second"]
        speedups[str(batch)] = round(last / first, 3)
    write({"arch": args.arch, "rows": rows, "speedup": speedups}, args.out)


if __name__ == "__main__":
    main()
