"""``mambamic predict``: classify image files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mambamic.backends import BACKENDS
from mambamic.cli.arguments import positive
from mambamic.errors import DecodeError, MambamicError, UsageError

# A client needs no torch, so that is imported only where the work is done here.
if TYPE_CHECKING:
    from mambamic.classifier import Classifier
    from mambamic.decoding import DecodePool
    from mambamic.prediction import Prediction

    Outcome = Prediction | MambamicError

TOKEN_VARIABLE = "MAMBAMIC_TOKEN"
DESCRIPTION = f"""\
Classify images, here with a checkpoint or by a server that runs elsewhere. A file that cannot be
read is reported, and the others are classified.

example:
  mambamic predict model_store/mambamic_t_pbc examples/cell.png
  mambamic predict model_store/mambamic_t_pbc cells/*.png --json > predictions.jsonl
  mambamic predict model_store/mambamic_t_pbc cells/*.png --embedding > embeddings.jsonl
  mambamic predict model.onnx examples/cell.png
  mambamic predict --server http://127.0.0.1:8080 cells/*.png

A token for the server is read from --token-file or the variable {TOKEN_VARIABLE}.

exit status: 0 all classified, 1 something failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic predict``."""
    parser.description = DESCRIPTION
    parser.usage = (
        "mambamic predict [options] CHECKPOINT IMAGE [IMAGE ...]\n"
        "       mambamic predict [options] --server URL IMAGE [IMAGE ...]"
    )
    add = parser.add_argument
    checkpoint = add(
        "checkpoint", metavar="CHECKPOINT", help="its folder, or a file of mambamic onnx"
    )
    images = add("images", nargs="+", metavar="IMAGE", help="image files")
    add("--json", action="store_true", help="print a JSON object per image, all classes in it")
    add(
        "--embedding",
        action="store_true",
        help="with what the network's head sees, a list of numbers in the JSON (implies --json)",
    )
    add("--batch-size", type=positive, default=32, help="images at a time (default: %(default)s)")
    here = parser.add_argument_group("here").add_argument
    here("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    here(
        "--backend",
        default="auto",
        choices=BACKENDS,
        help="of the scan, see mambamic doctor; or onnxruntime (default: auto)",
    )
    here("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (default: auto)")
    there = parser.add_argument_group("by a server").add_argument
    there(
        "--server",
        action=_Server,
        const=(checkpoint, images),
        metavar="URL",
        help="http://HOST:PORT or https://HOST:PORT",
    )
    there("--model", default="mambamic", help="its name there (default: %(default)s)")
    there("--token-file", type=Path, metavar="FILE", help="the token, on a line of its own")
    there("--ca", type=Path, metavar="PEM", help="trust these certificates")
    there("--timeout", type=positive, default=120, metavar="S", help="for an answer (default: 120)")
    there(
        "--patience",
        type=positive,
        default=120,
        metavar="S",
        help="how long to try again where the server is busy or away (default: %(default)s)",
    )


class _Server(argparse.Action):
    """``--server URL``: then there is no checkpoint, and what stands in its place is an image."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        namespace.server = values
        checkpoint, images = self.const
        checkpoint.nargs = "?"
        checkpoint.required = images.required = False


def run(args: argparse.Namespace) -> int:
    """Print a line per image, in order; return 1 if any failed."""
    if args.server is None:
        return _report(args, _from_here(args))
    args.images = [path for path in (args.checkpoint, *(args.images or ())) if path is not None]
    if not args.images:
        raise UsageError("no IMAGE", "at least one image file", "name one")
    return _report(args, _from_server(args))


def _report(args: argparse.Namespace, outcomes: Iterable[Outcome]) -> int:
    width = max(map(len, args.images))
    label_width = 0
    failed = False
    # None: no bar where standard error is not a terminal.
    with tqdm(total=len(args.images), delay=2, disable=None, unit="image") as bar:
        for path, outcome in zip(args.images, outcomes, strict=True):
            failed |= isinstance(outcome, MambamicError)
            if args.json or args.embedding:
                bar.write(json.dumps({"image": path, **outcome.as_json()}, ensure_ascii=False))
            elif isinstance(outcome, MambamicError):
                bar.write(f"{path}: {outcome}", file=sys.stderr)
            else:
                label_width = label_width or max(map(len, outcome.probabilities))
                label = f"{outcome.label:{label_width}}"
                bar.write(f"{path:{width}}  {label}  {outcome.probability:.4f}")
            bar.update()
    return 1 if failed else 0


def _from_server(args: argparse.Namespace) -> Iterator[Outcome]:
    from mambamic.bundles import Limits
    from mambamic.client import Client, Patience

    with Client(
        args.server,
        model=args.model,
        token=read_token(args.token_file),
        ca=args.ca,
        patience=Patience(answer=args.timeout, overall=args.patience),
        limits=Limits(tiles=args.batch_size),
    ) as client:
        yield from client.stream(args.images, embedding=args.embedding)


def read_token(path: Path | None) -> str | None:
    """Return the token of a file, or of the environment where there is none.

    Raises:
        UsageError: There is none in the file.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--token-file {path}: {error}", "a text file with a token", "give its path"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found or not found[0].isascii() or not found[0].isprintable():
        raise UsageError(
            f"--token-file {path} has no token", "one on a line of its own", "ask for one"
        )
    return found[0]


def _from_here(args: argparse.Namespace) -> Iterator[Outcome]:
    from mambamic.classifier import Classifier
    from mambamic.decoding import DecodePool

    classifier = Classifier.load(
        args.checkpoint, args.device, args.backend, args.dtype, max_batch=args.batch_size
    )
    with DecodePool(classifier.preprocess) as pool:
        for start in range(0, len(args.images), args.batch_size):
            files = [_read(Path(path)) for path in args.images[start : start + args.batch_size]]
            yield from _classify(classifier, pool, files, embed=args.embedding)


def _classify(
    classifier: Classifier,
    pool: DecodePool,
    files: Sequence[bytes | MambamicError],
    *,
    embed: bool,
) -> list[Outcome]:
    import numpy as np

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
