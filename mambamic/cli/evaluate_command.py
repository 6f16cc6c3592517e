"""``mambamic evaluate``: how good a checkpoint is on a split of a data set."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from mambamic.cli.arguments import positive

DESCRIPTION = """\
Measure a checkpoint on one split of a data set: metrics with 95 % intervals, plots, a table of all
predictions and a page that shows everything, in a new folder.

DATA is laid out as for training. --calibrate fits a temperature on the split "val", stores it in
the checkpoint's config.json, and reports the evaluated split before and after.

example:
  mambamic evaluate runs/blood/checkpoint blood_cells --split val --calibrate --out runs/blood/val
  mambamic evaluate runs/blood/checkpoint blood_cells --out runs/blood/test

exit status: 0 evaluated, 1 something failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic evaluate``."""
    from mambamic.classifier import DTYPES

    parser.description = DESCRIPTION
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint's folder")
    add("data", type=Path, metavar="DATA", help="the data set's folder, zip or npz")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--split", default="test", help="which images (default: %(default)s)")
    add("--calibrate", action="store_true", help="fit a temperature on val and store it")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="default: %(default)s")
    add("--batch-size", type=positive, help="images at a time (default: 32 on a CPU, 256 on a GPU)")
    add("--bootstrap", type=positive, default=1000, metavar="N",
        help="resamples for the intervals (default: %(default)s)")  # fmt: skip
    add("--seed", type=_seed, default=0, help="of the resamples (default: %(default)s)")
    add("--force", action="store_true", help="replace an earlier evaluation in DIR")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print the overall metrics and where the page is."""
    from mambamic.evaluation.run import REPORT, Evaluation, evaluate

    task = Evaluation(
        checkpoint=args.checkpoint,
        data=args.data,
        out=args.out,
        split=args.split,
        calibrate=args.calibrate,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        resamples=args.bootstrap,
        seed=args.seed,
        force=args.force,
        command=_command(args),
    )
    results = evaluate(task, progress=sys.stderr.isatty())
    print(f"{results['images']} images of split {args.split!r}, with 95 % intervals")
    for name, metric in results["overall"].items():
        print(f"  {name.replace('_', ' '):18} {_shown(metric)}")
    calibration = results["calibration"]
    if calibration is not None:
        before = calibration["before"]["calibration_error"]
        print(
            f"temperature {calibration['temperature']}, stored in {args.checkpoint}; "
            f"calibration error before: {_shown(before)}"
        )
    for note in results["notes"]:
        print(f"note: {note}")
    print(args.out / REPORT)
    return 0


def _shown(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "no value"
    return f"{metric['value']:.5f} ({metric['low']:.5f} to {metric['high']:.5f})"


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 0")
    return int(text)


def _command(args: argparse.Namespace) -> str:
    """Return the call that does the same again, whoever made this one."""
    words = ["mambamic", "evaluate", str(args.checkpoint), str(args.data), "--out", str(args.out)]
    words += ["--split", args.split, "--device", args.device, "--dtype", args.dtype]
    if args.batch_size is not None:
        words += ["--batch-size", str(args.batch_size)]
    words += ["--bootstrap", str(args.bootstrap), "--seed", str(args.seed)]
    words += ["--calibrate"] * args.calibrate + ["--force"] * args.force
    return shlex.join(words)
