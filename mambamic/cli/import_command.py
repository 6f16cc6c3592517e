"""``mambamic import``: turn weights of the published research code into a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from mambamic.checkpoint import save_checkpoint
from mambamic.config import ARCHITECTURES, HEADS, Config
from mambamic.errors import CheckpointError, UsageError
from mambamic.models import from_upstream
from mambamic.preprocess import INTERPOLATIONS, RESIZE_RULES
from mambamic.upstream import read_class_indices, read_weights

DESCRIPTION = """\
Turn a .pth file of the published research code into a checkpoint. Nothing that the file holds
besides tensors is loaded. The defaults are those of the published transforms.

example:
  mambamic import mambamic.pth --arch mambamic_t --classes class_indices.json --out cells

exit status: 0 written, 1 a file cannot be used, 2 the call is wrong
"""

_CARD = """\
---
license: {licence}
library_name: mambamic
pipeline_tag: image-classification
---

# {name}

{architecture} with {count} classes, imported from `{source}` (SHA-256 `{digest}`).

- Classes: {classes}
- Input: {size} x {size} pixels, resize `{resize}`, interpolation `{interpolation}`
- Trained on: {training_data}
- Licence: {licence}

Its accuracy has not been measured here. For research use only; not a medical device.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic import``."""
    default = Config(architecture=ARCHITECTURES[0], classes=("any",))
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("weights", type=Path, metavar="WEIGHTS.pth", help="the published code's file")
    add("--arch", required=True, choices=ARCHITECTURES, help="the network that it holds")
    add("--classes", type=Path, required=True, metavar="JSON", help="its class_indices.json")
    add("--out", type=Path, required=True, metavar="DIR", help="the checkpoint to write")
    add("--input-size", type=int, default=default.input_size, help="pixels (default: %(default)s)")
    add("--resize", choices=RESIZE_RULES, default=default.resize, help="default: %(default)s")
    add("--interpolation", choices=tuple(INTERPOLATIONS), default=default.interpolation)
    for name, value in (("--mean", default.mean), ("--std", default.std)):
        summary = "per channel, from 0 to 1 (default: 0.5)"
        add(name, type=float, nargs=3, metavar=("R", "G", "B"), default=value, help=summary)
    add("--mpp", type=float, help="microns per pixel of the tiles it was trained on")
    add("--head", choices=HEADS, default=default.head, help="default: %(default)s")
    add("--licence", default=default.licence, help="of the weights, such as Apache-2.0")
    add("--training-data", default=default.training_data, help="what it was trained on")
    add("--half", action="store_true", help="store float16 where it costs nothing")
    add("--force", action="store_true", help="replace a checkpoint that is there")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and print its path."""
    if args.out.exists() and not args.force:
        raise UsageError(f"{args.out} exists", "a new folder", "give --force, or another --out")
    classes = read_class_indices(args.classes)
    model = from_upstream(args.arch, read_weights(args.weights))
    count = model.head.out_features
    if count != len(classes):
        raise CheckpointError(
            f"{args.classes} names {len(classes)} classes",
            f"{count}, as the head in {args.weights} has",
            "use the class_indices.json of the same training",
        )
    config = _config(args, classes)
    card = _card(args, config)
    written = save_checkpoint(args.out, config, model.state_dict(), card, half=args.half)
    print(f"{written.path} ({args.arch}, {count} classes)")
    return 0


def _config(args: argparse.Namespace, classes: tuple[str, ...]) -> Config:
    return Config.from_settings(
        architecture=args.arch,
        classes=classes,
        input_size=args.input_size,
        resize=args.resize,
        interpolation=args.interpolation,
        mean=tuple(args.mean),
        std=tuple(args.std),
        mpp=args.mpp,
        head=args.head,
        licence=args.licence,
        training_data=args.training_data,
    )


def _card(args: argparse.Namespace, config: Config) -> str:
    return _CARD.format(
        name=args.out.name,
        architecture=config.architecture,
        count=len(config.classes),
        classes=", ".join(config.classes),
        source=args.weights.name,
        digest=hashlib.sha256(args.weights.read_bytes()).hexdigest(),
        size=config.input_size,
        resize=config.resize,
        interpolation=config.interpolation,
        training_data=config.training_data,
        licence=config.licence,
    )
