"""``mambamic archive``: pack a checkpoint into a TorchServe archive."""

from __future__ import annotations

import argparse
from pathlib import Path

from mambamic.cli.arguments import check_target
from mambamic.export.archive import FORMATS, write_archive

DESCRIPTION = """\
Pack a checkpoint into a TorchServe archive. It runs under any TorchServe 0.12 in whose
environment mambamic[serve] is installed. The hash of the weights is checked first.

example:
  mambamic archive model_store/mambamic_t_pbc --name cells --out model_store/cells.mar
  mambamic archive model_store/mambamic_t_pbc --format onnx --out model_store/cells.mar
  torchserve --start --model-store model_store --models cells=cells.mar

exit status: 0 written, 1 the checkpoint cannot be used, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic archive``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="the checkpoint's folder")
    add("--name", default="mambamic", help="under which it is served (default: %(default)s)")
    add("--version", default="1.0", help="of the model (default: %(default)s)")
    add("--out", type=Path, help="the file to write (default: NAME.mar in this folder)")
    add("--batch-size", type=int, default=32, help="requests per batch, at most (default: 32)")
    add("--format", default="torch", choices=FORMATS,
        help="weights, or a file for ONNX Runtime (default: %(default)s)")  # fmt: skip
    add("--force", action="store_true", help="replace an archive that is there")


def run(args: argparse.Namespace) -> int:
    """Write the archive and print its path."""
    out = args.out or Path(f"{args.name}.mar")
    check_target(out, force=args.force)
    written = write_archive(
        args.checkpoint,
        out,
        model_name=args.name,
        version=args.version,
        batch_size=args.batch_size,
        form=args.format,
    )
    print(f"{written} ({written.stat().st_size / 1e6:.1f} MB)")
    return 0
