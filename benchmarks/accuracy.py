"""Accuracy of a checkpoint on one split of a data set, through the library as users call it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common import write
from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.training.data import load_split


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    z, p = 1.959964, correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return centre - half, centre + half


def main() -> None:
    """Run the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder with the split, as a folder or zip")
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = load_checkpoint(args.checkpoint).config
    classifier = Classifier.load(args.checkpoint, device=args.device, dtype=args.dtype)
    split = load_split(args.data, args.split, config.preprocess, progress=True)
    if split.classes != config.classes:
        raise SystemExit(f"classes {split.classes} in the data, {config.classes} in the checkpoint")
    pixels = split.pixels.numpy()
    starts = range(0, len(split), args.batch)
    probabilities = np.concatenate(
        [classifier.probabilities(pixels[i : i + args.batch]) for i in tqdm(starts)]
    )
    labels, predicted = split.labels.numpy(), probabilities.argmax(-1)
    correct = int((predicted == labels).sum())
    low, high = wilson(correct, len(split))
    write(
        {
            "checkpoint": args.checkpoint.name,
            "weights_sha256": config.weights_sha256,
            "split": args.split,
            "images": len(split),
            "correct": correct,
            "accuracy": round(correct / len(split), 5),
            "interval_95": [round(low, 5), round(high, 5)],
            "recall": {
                name: round(float((predicted[labels == i] == i).mean()), 4)
                for i, name in enumerate(split.classes)
            },
            "inference": classifier.describe(),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
