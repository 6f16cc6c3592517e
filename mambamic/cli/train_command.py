"""``mambamic train``: from a folder of images to a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from mambamic.cli.arguments import positive
from mambamic.config import ARCHITECTURES
from mambamic.errors import UsageError
from mambamic.preprocess import Preprocess
from mambamic.training.recipe import Recipe, Strengths
from mambamic.training.recipe_files import DEFAULT, read_recipe, shipped

_DESCRIPTION = """Train a model on DATA/train, choosing the best epoch on DATA/val.

DATA holds train and val, as folders or as train.zip and val.zip, each SPLIT/CLASS/IMAGE; or it is
a MedMNIST .npz (docs/datasets.md). Where its images have several labels each, accuracy is that of
the labels.
A run that was stopped goes on where it was when the same command is given again.

examples:
  mambamic train blood_cells --arch mambamic_t --out runs/blood
  mambamic train blood_cells --arch mambamic_t --out runs/short --epochs 10 --devices 2
  mambamic train blood_cells --arch mambamic_t --out runs/paper --recipe published
  mambamic train my_cells --arch mambamic_t --out runs/mine --init runs/blood/checkpoint
  mambamic train my_cells --arch mambamic_t --out runs/small --teachers runs/*/checkpoint
  mambamic predict runs/blood/checkpoint cell.png

exit status: 0 trained, 1 something failed, 2 the call is wrong, 130 or 143 stopped
"""
_USAGE = "mambamic train DATA --arch ARCH --out OUT [option ...]"
_METAVARS = {int: "N", float: "X", str: "NAME"}
_NUMBERS = {2: ("LOW", "HIGH"), 3: ("R", "G", "B")}
_INPUT = {
    "input_size": "side of the model's input in pixels",
    "resize": "stretch or shorter_side",
    "interpolation": "bilinear or bicubic",
    "mean": "of red, green and blue, from 0 to 1 (mambamic data stats)",
    "std": "deviation, likewise",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = _DESCRIPTION
    parser.usage = _USAGE  # all fifty options before each error would hide it
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="folder with train and val, as folders or zips; or .npz",
    )
    parser.add_argument("--arch", required=True, help="mambamic_t|s|b or medmamba_t|s|b")
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and result")
    parser.add_argument(
        "--recipe",
        default=DEFAULT,
        metavar="NAME|FILE.toml",
        help=f"one of {', '.join(shipped())}, or your own (default {DEFAULT})",
    )
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from its weights (fine-tuning)"
    )
    parser.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=(),
        metavar="CHECKPOINT",
        help="learn from what these make of the images, beside the labels (distillation)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument(
        "--devices", type=positive, default=1, metavar="N", help="that share each batch (default 1)"
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="all of them, in the order wanted (default: sorted)",
    )
    parser.add_argument("--mpp", type=float, help="microns per pixel of the tiles")
    parser.add_argument("--licence", help="of the weights, for the model card (default: unknown)")
    parser.add_argument("--about", help="what the images are, likewise (default: unknown)")
    parser.add_argument("--quiet", action="store_true", help="no bars, no line per epoch")
    for title, kind in (("recipe", Recipe), ("augmentation", Strengths), ("input", Preprocess)):
        group = parser.add_argument_group(
            title, f"in place of what the recipe says; in brackets, what {DEFAULT} says"
        )
        for each in fields(kind):
            if each.name != "augmentation":
                _add(group, each)


def _add(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    """Add the option of one setting, which is absent from the result where it is not given."""
    default: Any = setting.default
    several = isinstance(default, tuple)
    shown = " ".join(f"{value:g}" for value in default) if several else default
    about = setting.metadata.get("about") or _INPUT[setting.name]
    group.add_argument(
        "--" + setting.name.replace("_", "-"),
        type=float if several else type(default),
        nargs=len(default) if several else None,
        metavar=_NUMBERS[len(default)] if several else _METAVARS[type(default)],
        default=argparse.SUPPRESS,
        help=f"{about} ({shown})",
    )


def _changes(args: Mapping[str, Any]) -> dict[str, Any]:
    settings = [each.name for kind in (Recipe, Strengths, Preprocess) for each in fields(kind)]
    given = {name: args[name] for name in settings if name in args}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def run(args: argparse.Namespace) -> int:
    """Train and print where the checkpoint is and how good it is."""
    from mambamic.training.run import RESULT, Run, train

    if args.arch not in ARCHITECTURES:
        raise UsageError(f"--arch {args.arch!r}", " or ".join(ARCHITECTURES), "choose one of these")
    recipe, preprocess = read_recipe(args.recipe, _changes(vars(args)))
    task = Run(
        data=args.data,
        architecture=args.arch,
        out=args.out,
        recipe=recipe,
        preprocess=preprocess,
        mpp=args.mpp,
        licence=args.licence,
        training_data=args.about,
        init=args.init,
        teachers=tuple(args.teachers),
        classes=tuple(args.classes) if args.classes else None,
    )
    finished = (args.out / RESULT).exists()
    try:
        checkpoint = train(task, device=args.device, devices=args.devices, progress=not args.quiet)
    except (KeyboardInterrupt, SystemExit):
        print("stopped; the same command goes on after the last finished epoch", file=sys.stderr)
        raise
    if finished:
        note = "is of a finished run, and nothing was trained; to train again give another --out"
        print(f"{checkpoint.path} {note}", file=sys.stderr)
    metrics = checkpoint.config.metrics
    print(
        f"{checkpoint.path}: validation accuracy {metrics['val_accuracy']:.4f} "
        f"(epoch {metrics['best_epoch']} of {metrics['epochs']}, {metrics['minutes']} minutes, "
        f"{metrics['images_per_second']} images/s)"
    )
    return 0
