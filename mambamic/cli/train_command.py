"""``mambamic train``: from a folder of images to a checkpoint."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from mambamic.training.recipe import Recipe

_DESCRIPTION = """Train a model on DATA/train, choosing the best epoch on DATA/val.

DATA holds train and val, as folders or as train.zip and val.zip, each SPLIT/CLASS/IMAGE; or it is
a MedMNIST .npz (docs/datasets.md). Where its images have several labels each, accuracy is that of
the labels.
A run that was stopped goes on where it was when the same command is given again.

example:
  mambamic train blood_cells --arch mambamic_t --out runs/blood --epochs 40
  mambamic predict runs/blood/checkpoint cell.png

exit status: 0 trained, 1 something failed, 2 the call is wrong, 130 or 143 stopped
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "data", type=Path, help="folder with train and val, as folders or zips; or .npz"
    )
    parser.add_argument("--arch", required=True, help="mambamic_t|s|b or medmamba_t|s|b")
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and result")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--input-size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--mpp", type=float, help="microns per pixel of the tiles")
    parser.add_argument("--licence", default="unknown", help="of the weights, for the model card")
    parser.add_argument("--about", default="unknown", help="what the images are, for the card")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    for field in fields(Recipe):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            help=f"(default {field.default})",
        )


def run(args: argparse.Namespace) -> int:
    """Train and print where the checkpoint is and how good it is."""
    from mambamic.preprocess import Preprocess
    from mambamic.training.run import Run, train

    task = Run(
        data=args.data,
        architecture=args.arch,
        out=args.out,
        recipe=Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)}),
        preprocess=Preprocess(input_size=args.input_size),
        mpp=args.mpp,
        licence=args.licence,
        training_data=args.about,
    )
    try:
        checkpoint = train(task, device=args.device, progress=not args.quiet)
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command goes on after the last finished epoch", file=sys.stderr)
        raise
    metrics = checkpoint.config.metrics
    print(
        f"{checkpoint.path}: validation accuracy {metrics['val_accuracy']:.4f} "
        f"(epoch {metrics['best_epoch']} of {metrics['epochs']}, "
        f"{metrics['images_per_second']} images/s)"
    )
    return 0
