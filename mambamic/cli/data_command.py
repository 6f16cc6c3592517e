"""``mambamic data``: look at a data set before training on it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mambamic.cli.arguments import positive
from mambamic.data import check as checks
from mambamic.data.npz import read_class_names
from mambamic.data.source import SPLITS
from mambamic.data.stats import statistics
from mambamic.preprocess import RESIZE_RULES, Preprocess

DESCRIPTION = """\
Look at a data set before training on it. DATA is a folder with train, val and test, as folders or
zips, each SPLIT/CLASS/IMAGE; a zip of such a folder; or a MedMNIST .npz (docs/datasets.md).

check   decode every image: classes, sizes, unreadable files, exact duplicates within and across
        splits, classes that a split lacks
stats   mean and standard deviation per channel, from 0 to 1, to normalise with

example:
  mambamic data check blood_cells
  mambamic data check tissuemnist.npz --json > report.json
  mambamic data stats blood_cells --input-size 224

exit status: 0 nothing wrong, 1 something spoils a result (unreadable files, an image in two splits,
a class that a split lacks, one class alone) or the data cannot be read, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic data``."""
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest="action", metavar="check|stats", required=True)
    check = actions.add_parser("check", help="what is in it, and what is wrong")
    check.add_argument("--classes", type=Path, metavar="FILE",
                       help="names in the order of the labels, one per line (default: the folders; "
                            "for NAME.npz, NAME.classes.txt, or 0, 1 and so on)")  # fmt: skip
    stats = actions.add_parser("stats", help="mean and standard deviation")
    stats.add_argument("--split", default="train", help=f"{', '.join(SPLITS)} (default: train)")
    stats.add_argument("--input-size", type=positive, metavar="N",
                       help="bring images to N x N pixels first, as the model will see them "
                            "(default: as they are stored)")  # fmt: skip
    stats.add_argument("--resize", choices=RESIZE_RULES, default=Preprocess.resize,
                       help="how, with --input-size (default: %(default)s)")  # fmt: skip
    for action in (check, stats):
        action.description, action.formatter_class = DESCRIPTION, parser.formatter_class
        action.add_argument("data", type=Path, metavar="DATA", help="folder, zip or .npz")
        action.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what was found; return 1 where it spoils a result."""
    return _check(args) if args.action == "check" else _stats(args)


def _check(args: argparse.Namespace) -> int:
    classes = None if args.classes is None else read_class_names(args.classes)
    report = checks.check(args.data, classes)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print("\n".join(checks.lines(report)))
    return 1 if report["problems"] else 0


def _stats(args: argparse.Namespace) -> int:
    preprocess = None
    if args.input_size is not None:
        preprocess = Preprocess(args.input_size, args.resize)
    found = statistics(args.data, args.split, preprocess).as_json()
    if args.json:
        print(json.dumps(found))
    else:
        print(f"# {found['images']} images, {found['pixels']} pixels of split {args.split}")
        print(f"mean = {found['mean']}")
        print(f"std = {found['std']}")
    return 0
