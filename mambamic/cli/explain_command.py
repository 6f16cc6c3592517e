"""``mambamic explain``: pictures of where in an image a prediction comes from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from mambamic.backends import SCAN_BACKENDS
from mambamic.classifier import Classifier
from mambamic.errors import DecodeError, MambamicError, UsageError
from mambamic.explain.explanation import METHODS, STAGES, Explanation, Question
from mambamic.explain.overlay import encode, overlay
from mambamic.images import decode

DESCRIPTION = """\
Show where in an image the evidence for a class lies: for each image a PNG with a heat map over
it, and the class and its probability below. A file that cannot be read is reported,
and the others are explained.

example:
  mambamic explain model_store/mambamic_t_pbc examples/cell.png --out explained
  mambamic explain model_store/mambamic_t_pbc cells/*.png --out explained --class lymphocyte

exit status: 0 all explained, 1 something failed, 2 the call is wrong
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic explain``."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="its folder, or an ONNX file")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    add(
        "--method",
        default="auto",
        choices=("auto", *METHODS),
        help="auto: grad-cam for MedMamba, occlusion for MambaMIC (default: %(default)s)",
    )
    add("--class", dest="label", metavar="NAME", help="class to explain (default: the predicted)")
    add("--stage", type=int, choices=STAGES, help="of grad-cam (default: the last, 4)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--backend", default="auto", choices=SCAN_BACKENDS, help="of the scan (default: auto)")
    add("--json", action="store_true", help="print a JSON object per image, all classes in it")


def run(args: argparse.Namespace) -> int:
    """Write a picture and print a line per image, in order; return 1 if any failed."""
    classifier = Classifier.load(args.checkpoint, args.device, args.backend)
    question = Question(classifier, args.method, args.label, args.stage)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{args.out} cannot be made ({error.strerror})", "a folder", "give another --out"
        ) from error
    failed = False
    # None: no bar where standard error is not a terminal.
    with tqdm(total=len(args.images), delay=2, disable=None, unit="image") as bar:
        for path, target in zip(args.images, _targets(args.images, args.out), strict=True):
            try:
                explanation = _explain(question, path, target)
                bar.write(_line(path, target, explanation, as_json=args.json))
            except MambamicError as error:
                failed = True
                if args.json:
                    bar.write(json.dumps({"image": str(path), **error.as_json()}))
                else:
                    bar.write(f"{path}: {error}", file=sys.stderr)
            bar.update()
    return 1 if failed else 0


def _targets(images: list[Path], folder: Path) -> list[Path]:
    """Return a file for each image, no two the same."""
    taken: set[str] = set()
    targets = []
    for path in images:
        name, number = f"{path.stem}.explained.png", 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}.explained.png"
        taken.add(name)
        targets.append(folder / name)
    return targets


def _explain(question: Question, path: Path, target: Path) -> Explanation:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DecodeError(
            f"it cannot be read ({error.strerror})", "an image file", "check the path"
        ) from error
    image = decode(data)
    preprocess = question.classifier.preprocess
    explanation = question.explain(preprocess.pixels(image))
    picture = encode(overlay(image, explanation, preprocess))
    try:
        target.write_bytes(picture)
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written ({error.strerror})", "a folder with room", "free some"
        ) from error
    return explanation


def _line(path: Path, target: Path, explanation: Explanation, *, as_json: bool) -> str:
    if as_json:
        fields = {"image": str(path), **explanation.as_json(), "overlay": str(target)}
        return json.dumps(fields, ensure_ascii=False)
    probability = explanation.prediction.probabilities[explanation.label]
    return f"{path}  {explanation.label}  {probability:.4f}  {target}"
