"""``mambamic onnx``: export a checkpoint for ONNX Runtime."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambamic.checkpoint import Checkpoint, load_checkpoint
from mambamic.cli.arguments import check_target
from mambamic.decoding import DecodePool
from mambamic.errors import MambamicError, UsageError
from mambamic.preprocess import Pixels

DESCRIPTION = """\
Write a checkpoint as one ONNX file that a stock ONNX Runtime runs, without torch and without a
library of custom operators: uint8 pixels in, probabilities out, any batch size. docs/onnx.md says
how to call it from Python and from other languages.

example:
  mambamic onnx model_store/mambamic_t_pbc model.onnx
  mambamic onnx model_store/mambamic_t_pbc model.onnx --verify --images cells/*.png
  mambamic predict model.onnx examples/cell.png

exit status: 0 written (and verified), 1 it differs or cannot be made, 2 the call is wrong
"""

_RANDOM = 8  # images of noise to verify with


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic onnx``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint's folder")
    add("out", type=Path, metavar="FILE", help="the file to write, such as model.onnx")
    add("--float-input", action="store_true",
        help="take normalised float32 images (B, 3, S, S) instead of uint8 pixels")  # fmt: skip
    add("--verify", action="store_true",
        help="compare with torch in float32, at batches 1, 2, 3 and 8")  # fmt: skip
    add("--images", type=Path, nargs="+", default=(), metavar="IMAGE",
        help="real images to verify with, beside random ones")  # fmt: skip
    add("--force", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> int:
    """Write the file; return 1 if it was to be verified and differs from torch."""
    if args.out.suffix != ".onnx":
        raise UsageError(f"{args.out}", "a name that ends in .onnx", "give another name")
    check_target(args.out, force=args.force)
    if args.images and not args.verify:
        raise UsageError("--images without --verify", "both", "add --verify")
    from mambamic.export.onnx_export import write_onnx

    checkpoint = load_checkpoint(args.checkpoint)
    given = _decoded(checkpoint, args.images) if args.images else None
    begun = time.monotonic()
    written = write_onnx(checkpoint, args.out, float_input=args.float_input)
    took = time.monotonic() - begun
    print(f"{written} ({written.stat().st_size / 1e6:.1f} MB, written in {took:.1f} s)")
    return _verify(checkpoint, written, given) if args.verify else 0


def _verify(checkpoint: Checkpoint, path: Path, given: Pixels | None) -> int:
    from mambamic.export.onnx_verify import TOLERANCE, random_pixels, verify

    pixels = random_pixels(_RANDOM, checkpoint.config.input_size)
    if given is not None:
        pixels = np.concatenate([pixels, given])
    differs = False
    for found in verify(checkpoint, path, pixels):
        differs |= not found.holds
        print(
            f"batch {found.batch}: {found.images} images, largest difference of a probability "
            f"{found.largest:.1e}, other labels {found.labels}"
        )
    print(f"{'NOT ' if differs else ''}within {TOLERANCE:.0e} of torch in float32")
    return int(differs)


def _decoded(checkpoint: Checkpoint, images: Sequence[Path]) -> Pixels:
    try:
        files = [path.read_bytes() for path in images]
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror})", "an image", "check the path"
        ) from error
    with DecodePool(checkpoint.config.preprocess) as pool:
        decoded = pool.map(files)
    for path, item in zip(images, decoded, strict=True):
        if isinstance(item, MambamicError):
            raise type(item)(f"{path}: {item.problem}", item.expected, item.remedy)
    return np.stack([item for item in decoded if not isinstance(item, MambamicError)])
