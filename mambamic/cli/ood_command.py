"""``mambamic ood``: teach a checkpoint to tell images of its kind from others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mambamic.classifier import Classifier
    from mambamic.ood import Detector
    from mambamic.training.data import Split

DESCRIPTION = """\
Fit a detector of images unlike those that a checkpoint knows, to the validation split, and store
it beside the weights. Every prediction then carries "in_distribution" and "ood_score".

--report fits it to every other validation image first, and measures it on the rest: against blank
tiles and the same images at half and double scale, made here, and the images of --outliers.

example:
  mambamic ood runs/cells/checkpoint cells
  mambamic ood runs/cells/checkpoint cells --report --outliers other_stain

exit status: 0 stored, 1 something failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic ood``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint's folder")
    add("data", type=Path, metavar="DATA", help="the data set, laid out as for training")
    add("--split", default="val", help="which images it is fitted to (default: %(default)s)")
    add("--report", action="store_true", help="measure it as well, and print how well it tells")
    add("--outliers", type=Path, nargs="+", default=[], metavar="DIR", help="folders of images")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Fit, store, and print what was found."""
    from mambamic.checkpoint import load_checkpoint
    from mambamic.classifier import Classifier
    from mambamic.ood import fit_detector, store_detector
    from mambamic.training.data import load_split

    _check_outliers(args)
    checkpoint = load_checkpoint(args.checkpoint)
    # Not with an earlier detector: this may be the call that is to replace a bad one.
    classifier = Classifier.load(checkpoint, args.device, detect=False)
    config = checkpoint.config
    split = load_split(
        args.data,
        args.split,
        config.preprocess,
        classes=config.classes,
        progress=sys.stderr.isatty(),
    )
    _check_number(len(split), args)
    outliers = {str(folder): _read(folder, classifier) for folder in args.outliers}
    embeddings = _embeddings(classifier, split.pixels.numpy(), f"embedding {args.split}")
    detector = fit_detector(embeddings, split.labels.numpy())
    if args.report:
        _report(classifier, split, embeddings, outliers)
    print(f"{store_detector(checkpoint, detector)}: fitted to {len(split)} images")
    return 0


def _check_outliers(args: argparse.Namespace) -> None:
    from mambamic.errors import UsageError

    if args.outliers and not args.report:
        raise UsageError("--outliers alone", "--report beside it", "add --report")
    places = [folder.resolve() for folder in args.outliers]
    for folder, place in zip(args.outliers, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"--outliers has {folder} twice", "each folder once", "leave one out")


def _check_number(images: int, args: argparse.Namespace) -> None:
    """Refuse too few images before the network has seen them all."""
    from mambamic.errors import DataError
    from mambamic.ood import MINIMUM

    # The report fits to every other image, from the first.
    needed = 2 * MINIMUM - 1 if args.report else MINIMUM
    if images >= needed:
        return
    remedy = "hold back more images"
    if images >= MINIMUM:
        remedy += f", or leave out --report, without which {MINIMUM} are enough"
    what = "to fit to every other and measure on the rest" if args.report else "to fit to"
    raise DataError(
        f"{images} images in split {args.split!r} of {args.data}",
        f"at least {needed} {what}",
        remedy,
    )


def _embeddings(
    classifier: Classifier, pixels: NDArray[np.uint8], title: str
) -> NDArray[np.float32]:
    from mambamic.evaluation.predictions import in_chunks

    return in_chunks(
        classifier.embeddings,
        pixels,
        classifier.max_batch,
        title=title,
        progress=sys.stderr.isatty(),
    )


def _report(
    classifier: Classifier,
    split: Split,
    embeddings: NDArray[np.float32],
    outliers: dict[str, NDArray[np.uint8]],
) -> None:
    """Print a line per kind of image: AUROC, and the share that is told to be unknown."""
    from mambamic.ood import auroc, fit_detector, made_outliers

    detector: Detector = fit_detector(embeddings[::2], split.labels.numpy()[::2])
    known = detector.scores(embeddings[1::2])
    # Pairs, not one mapping: a folder may have the name of a kind that is made here.
    kinds = [*made_outliers(split.pixels.numpy()[1::2]).items(), *outliers.items()]
    width = max(16, *(len(name) for name, _ in kinds))
    rows = []
    for name, pixels in kinds:
        scores = detector.scores(_embeddings(classifier, pixels, f"embedding {name}"))
        area, told = auroc(known, scores), (scores > 1).mean()
        rows.append(f"{name:{width}} {len(scores):6} {area:6.3f} {told:8.1%}")
    print(f"{'images':{width}} {'number':>6} {'AUROC':>6} {'unknown':>8}")
    print(f"{'held-out':{width}} {len(known):6} {'':6} {(known > 1).mean():8.1%}")
    print("\n".join(rows))


def _read(folder: Path, classifier: Classifier) -> NDArray[np.uint8]:
    from mambamic.decoding import DecodePool
    from mambamic.errors import DataError, MambamicError

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with DecodePool(classifier.preprocess) as pool:
        decoded: Sequence[NDArray[np.uint8] | MambamicError] = pool.map(
            [path.read_bytes() for path in files]
        )
    for path, pixels in zip(files, decoded, strict=True):
        if isinstance(pixels, MambamicError):
            raise DataError(f"{path}: {pixels.problem}", pixels.expected, "remove or replace it")
    if not files:
        raise DataError(f"{folder} holds no file", "a folder of images", "check the path")
    return np.stack([pixels for pixels in decoded if not isinstance(pixels, MambamicError)])
