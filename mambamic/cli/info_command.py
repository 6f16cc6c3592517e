"""``mambamic info``: what a model has and does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mambamic.checkpoint import load_checkpoint
from mambamic.cli.arguments import positive
from mambamic.errors import UsageError
from mambamic.info import examine, lines
from mambamic.models import VARIANTS, create_model

DESCRIPTION = """\
Count, for one image: parameters (as used, and as published with the tensors that the published code
allocates and never uses), multiply-adds, state updates of the scans, and activation memory, stage
by stage. MODEL is a checkpoint's folder or one of:
  mambamic_t mambamic_s mambamic_b medmamba_t medmamba_s medmamba_b

example:
  mambamic info mambamic_t
  mambamic info model_store/mambamic_t_pbc --json

exit status: 0 counted, 1 the checkpoint cannot be used, 2 the call is wrong
"""
_PUBLISHED_CLASSES, _PUBLISHED_SIZE = 1000, 224


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic info``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's folder, or a variant")
    add("--input-size", type=positive, metavar="N",
        help=f"pixels (default: the checkpoint's, or {_PUBLISHED_SIZE})")  # fmt: skip
    add("--num-classes", type=positive, metavar="N",
        help=f"of a variant's head (default: {_PUBLISHED_CLASSES}, as published)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.model in VARIANTS:
        name, title = args.model, args.model
        size, classes = _PUBLISHED_SIZE, args.num_classes or _PUBLISHED_CLASSES
    else:
        if not Path(args.model).is_dir():
            raise UsageError(
                f"model {args.model!r}",
                "a checkpoint's folder, or one of " + ", ".join(VARIANTS),
                "check the path or the name",
            )
        if args.num_classes is not None:
            raise UsageError(
                f"--num-classes {args.num_classes}", "none: the checkpoint has its own", "omit it"
            )
        config = load_checkpoint(args.model).config
        name, title = config.architecture, f"{args.model} ({config.architecture})"
        size, classes = config.input_size, len(config.classes)
    model, size = create_model(name, classes), args.input_size or size
    if size < model.minimum_size:
        raise UsageError(f"--input-size {size}", f"at least {model.minimum_size}", "enlarge it")
    info = examine(model, size)
    if args.json:
        print(json.dumps({"architecture": name, **info.as_json()}, indent=2))
    else:
        print("\n".join(lines(info, title)))
    return 0
