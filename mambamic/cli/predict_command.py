"""``mambamic predict``: classify image files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mambamic.classifier import BACKENDS, DTYPES, Classifier
from mambamic.cli.arguments import positive
from mambamic.decoding import DecodePool
from mambamic.errors import DecodeError, MambamicError
from mambamic.prediction import Prediction

DESCRIPTION = """\
Classify images. A file that cannot be read is reported, and the others are classified.

example:
  mambamic predict model_store/mambamic_t_pbc examples/cell.png
  mambamic predict model_store/mambamic_t_pbc cells/*.png --json > predictions.jsonl
  mambamic predict model_store/mambamic_t_pbc cells/*.png --embedding > embeddings.jsonl
  mambamic predict model.onnx examples/cell.png

exit status: 0 all classified, 1 something failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic predict``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a file of mambamic onnx",
    )
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add(
        "--backend",
        default="auto",
        choices=BACKENDS,
        help="of the scan, or onnxruntime (default: %(default)s)",
    )
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="default: %(default)s")
    add("--batch-size", type=positive, default=32, help="images at a time (default: %(default)s)")
    add("--json", action="store_true", help="print a JSON object per image, all classes in it")
    add(
        "--embedding",
        action="store_true",
        help="with what the network's head sees, a list of numbers in the JSON (implies --json)",
    )


def run(args: argparse.Namespace) -> int:
    """Print a line per image, in order; return 1 if any failed."""
    classifier = Classifier.load(
        args.checkpoint, args.device, args.backend, args.dtype, max_batch=args.batch_size
    )
    width = max(len(str(path)) for path in args.images)
    label_width = max(map(len, classifier.config.classes))
    failed = False
    # None: no bar where standard error is not a terminal.
    with tqdm(total=len(args.images), delay=2, disable=None, unit="image") as bar:
        for path, outcome in _outcomes(classifier, args):
            failed |= isinstance(outcome, MambamicError)
            if args.json or args.embedding:
                bar.write(json.dumps({"image": str(path), **outcome.as_json()}, ensure_ascii=False))
            elif isinstance(outcome, MambamicError):
                bar.write(f"{path}: {outcome}", file=sys.stderr)
            else:
                label = f"{outcome.label:{label_width}}"
                bar.write(f"{path!s:{width}}  {label}  {outcome.probability:.4f}")
            bar.update()
    return 1 if failed else 0


def _outcomes(
    classifier: Classifier, args: argparse.Namespace
) -> Iterator[tuple[Path, Prediction | MambamicError]]:
    with DecodePool(classifier.preprocess) as pool:
        for start in range(0, len(args.images), args.batch_size):
            batch = args.images[start : start + args.batch_size]
            files = [_read(path) for path in batch]
            outcomes = _classify(classifier, pool, files, embed=args.embedding)
            yield from zip(batch, outcomes, strict=True)


def _classify(
    classifier: Classifier,
    pool: DecodePool,
    files: Sequence[bytes | MambamicError],
    *,
    embed: bool,
) -> list[Prediction | MambamicError]:
    decoded = iter(pool.map([file for file in files if isinstance(file, bytes)]))
    tiles = [next(decoded) if isinstance(file, bytes) else file for file in files]
    pixels = [tile for tile in tiles if not isinstance(tile, MambamicError)]
    if not pixels:
        return [tile for tile in tiles if isinstance(tile, MambamicError)]
    probabilities, embeddings = classifier.outputs(np.stack(pixels))
    predictions = iter(classifier.predictions(probabilities, embeddings, embed=embed))
    return [tile if isinstance(tile, MambamicError) else next(predictions) for tile in tiles]


def _read(path: Path) -> bytes | MambamicError:
    try:
        return path.read_bytes()
    except OSError as error:
        return DecodeError(
            f"it cannot be read ({error.strerror})", "an image file", "check the path"
        )
