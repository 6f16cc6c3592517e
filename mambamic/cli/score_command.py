"""``mambamic score``: every tile of whole slides."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mambamic.cli.arguments import positive

if TYPE_CHECKING:
    from mambamic.slides.remote import Server

DESCRIPTION = """\
Score every tile of slides, or of folders and ZIP archives of tiles: per slide a table (Parquet),
objects for QuPath (GeoJSON), heat maps and a page, and a page and record over all. A run that was
stopped, however it was, goes on where it was when it is called again; several processes and
machines may share one output folder.

The model says at which resolution it wants to see slides. Where it does not, give --target-mpp, or
--tile-px for tiles of the slides' own pixels.

example:
  mambamic score slides/ --model model_store/mambamic_t_pbc --out scores --tile-px --dry-run
  mambamic score slides/ --model model_store/mambamic_t_pbc --out scores --tile-px --tile 200
  mambamic score slides.csv --model lung --out scores --tissue annotations/ --csv

exit status: 0 all scored, 1 a slide or the run failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic score``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="slides, folders, patterns, ZIPs, CSV manifests")
    add("--model", type=Path, metavar="CHECKPOINT", help="a checkpoint or WSInfer model folder")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--manifest", type=Path, metavar="CSV", help="columns path, and where known mpp, mask, id")
    add("--tiles", action="store_true", help="every image in INPUT is one tile")
    cut = parser.add_argument_group("how slides are cut")
    cut.add_argument("--mpp", type=_above_zero, metavar="X", help="of slides whose file is wrong")
    cut.add_argument("--target-mpp", type=_above_zero, metavar="X", help="at which tiles are seen")
    cut.add_argument("--tile-px", action="store_true", help="tiles of the slides' own pixels")
    cut.add_argument("--tile", type=positive, metavar="N", help="side (default: the model's)")
    cut.add_argument("--stride", type=positive, metavar="N", help="default: no overlap, no gaps")
    cut.add_argument("--tissue", default="otsu", metavar="otsu|none|FILE",
        help="FILE: a mask image, GeoJSON, or folder of these (default: %(default)s)")  # fmt: skip
    cut.add_argument("--min-tissue", type=_share, default=0.1, metavar="SHARE",
        help="least share of tissue in a tile (default: 10%%)")  # fmt: skip
    run = parser.add_argument_group("how it is run")
    run.add_argument("--workers", type=positive, metavar="N", help="readers (default: by cores)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--devices", type=positive, default=1, metavar="N",
        help="GPUs, a process for each (default: %(default)s)")  # fmt: skip
    run.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: HOST:PORT, or auto")
    run.add_argument("--dtype", default="auto", help="default: %(default)s")
    run.add_argument("--max-bad-tiles", type=_share, default=0.05, metavar="SHARE",
        help="a slide with more fails (default: 5%%)")  # fmt: skip
    run.add_argument("--dry-run", action="store_true", help="print the plan and score nothing")
    there = parser.add_argument_group("by a server that has the same checkpoint")
    there.add_argument("--server", metavar="URL", help="http://HOST:PORT or https://HOST:PORT")
    there.add_argument("--server-model", default="mambamic", metavar="NAME",
        help="the model's name there (default: %(default)s)")  # fmt: skip
    there.add_argument("--token-file", type=Path, metavar="FILE", help="the token, on its own line")
    there.add_argument("--ca", type=Path, metavar="PEM", help="trust these certificates")
    there.add_argument("--connections", type=positive, default=4, metavar="N",
        help="requests at a time (default: %(default)s)")  # fmt: skip
    zoo = parser.add_argument_group("with a model of the WSInfer zoo")
    zoo.add_argument("--head", choices=("softmax", "sigmoid"), help="what its outputs are")
    zoo.add_argument("--trust", action="store_true", help="run the code that TorchScript carries")
    add("--embeddings", action="store_true", help="keep what the network's head sees, per tile")
    add("--csv", action="store_true", help="write the tables as CSV too")
    add("--no-geojson", action="store_true", help="leave out the objects for QuPath")


def run(args: argparse.Namespace) -> int:
    """Score, and print what became of each slide; return 1 if any failed."""
    from mambamic.slides.call import Call, score_slides

    named = args.tissue in ("otsu", "none")
    call = Call(
        inputs=args.inputs,
        manifest=args.manifest,
        tiles=args.tiles,
        model=args.model,
        out=args.out,
        mpp=args.mpp,
        target_mpp=args.target_mpp,
        own_pixels=args.tile_px,
        tile=args.tile,
        stride=args.stride,
        tissue=args.tissue if named else "otsu",
        tissue_file=None if named else Path(args.tissue),
        min_tissue=args.min_tissue,
        workers=args.workers,
        device=args.device,
        devices=args.devices,
        dtype=args.dtype,
        max_bad=args.max_bad_tiles,
        dry_run=args.dry_run,
        embeddings=args.embeddings,
        csv=args.csv,
        geojson=not args.no_geojson,
        command=shlex.join(["mambamic", *sys.argv[1:]]),
        head=args.head,
        trust=args.trust,
        server=_server(args),
        ray=args.ray,
    )
    try:
        outcome = score_slides(call)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the tiles that are missing", file=sys.stderr)
        raise
    for line in outcome.lines:
        print(line)
    for line in outcome.complaints:
        print(line, file=sys.stderr)
    return outcome.status


def _server(args: argparse.Namespace) -> Server | None:
    if args.server is None:
        return None
    from mambamic.cli.predict_command import read_token
    from mambamic.slides.remote import Server

    token = read_token(args.token_file)
    return Server(args.server, args.server_model, token, args.ca, args.connections)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r}; expected microns per pixel, above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share such as 5% or 0.05")
    return value
