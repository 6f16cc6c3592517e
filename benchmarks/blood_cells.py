"""Evaluate the runs of a training campaign on blood cells, for docs/results.md's table.

RUNS holds a folder for each ``mambamic train``, named as it will be in the table. Each checkpoint
gets its temperature from the validation images, then sees the test images once. What the file of
results says of other runs stays.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write
from benchmarks.table import ROOT
from mambamic.benchmark.environment import environment
from mambamic.checkpoint import load_checkpoint
from mambamic.evaluation.run import METRICS, PREDICTIONS, Evaluation, evaluate
from mambamic.training.fit import LOG
from mambamic.training.run import RESULT

RESULTS = ROOT / "benchmarks/results/blood_cells.json"
_RESAMPLES = 1000
_TRAINED = ("seed", "epochs", "best_epoch", "minutes", "images_per_second", "device", "devices")

Row = dict[str, Any]


def evaluated(run: Path, data: Path, split: str) -> Row:
    """Return what one run came to."""
    config = load_checkpoint(run / RESULT).config
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "evaluation")
        evaluate(
            Evaluation(run / RESULT, data, out, split, calibrate=True, dtype="float32"),
            progress=True,
        )
        measured = json.loads((out / METRICS).read_text())
        with (out / PREDICTIONS).open(newline="") as file:
            wrong = [
                place
                for place, row in enumerate(csv.DictReader(file))
                if row["true"] != row["predicted"]
            ]
    calibration = measured["calibration"]
    return {
        "run": run.name,
        "architecture": config.architecture,
        "teachers": len(config.metrics.get("teachers", ())),
        **{name: config.metrics[name] for name in _TRAINED if name in config.metrics},
        "val_accuracy": config.metrics["val_accuracy"],
        "weights_sha256": config.weights_sha256,
        "temperature": calibration["temperature"],
        "calibration_error_before": calibration["before"]["calibration_error"],
        "split": split,
        "evaluated_on": environment()["device"],
        "images": measured["images"],
        "wrong": wrong,
        "overall": measured["overall"],
        "classes": {name: row["sensitivity"] for name, row in measured["classes"].items()},
        "curve": curve(run / LOG),
    }


def curve(log: Path) -> list[float]:
    """Return the validation accuracy after each epoch; a run that was resumed left several logs."""
    found = {}
    for part in sorted(log.glob("version_*/metrics.csv")):
        with part.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["val_accuracy"]:
                    found[int(row["epoch"])] = round(float(row["val_accuracy"]), 5)
    return [found[epoch] for epoch in sorted(found)]


def mean_of_seeds(rows: list[Row]) -> Row:
    """Return the means over runs that differ in their seed, accuracy with its 95 % interval.

    The interval is over images, of which all runs see the same: the middle of resamples of the
    share of seeds that are right, per image.
    """
    share = np.ones(rows[0]["images"])
    for row in rows:
        share[row["wrong"]] -= 1 / len(rows)
    drawn = np.random.default_rng(0).integers(len(share), size=(_RESAMPLES, len(share)))
    low, high = np.quantile(share[drawn].mean(1), (0.025, 0.975))
    return {
        "architecture": rows[0]["architecture"],
        "teachers": rows[0]["teachers"],
        "seeds": [row["seed"] for row in rows],
        "accuracy": {"value": share.mean(), "low": low, "high": high},
        **{
            name: {"value": float(np.mean([row["overall"][name]["value"] for row in rows]))}
            for name in ("auc", "f1", "calibration_error")
        },
    }


def main() -> None:
    """Evaluate all runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path, help="folder with val.zip and the split's")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = [run for run in sorted(args.runs.iterdir()) if (run / RESULT).is_dir()]
    known = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    found = {row["run"]: row for row in known}
    found |= {run.name: evaluated(run, args.data, args.split) for run in runs}
    rows = sorted(
        found.values(), key=lambda row: (row["architecture"], -row["teachers"], row["seed"])
    )
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["teachers"]), []).append(row)
    means = [mean_of_seeds(group) for group in groups.values() if len(group) > 1]
    write({"runs": rows, "means": means}, args.out)


if __name__ == "__main__":
    main()
