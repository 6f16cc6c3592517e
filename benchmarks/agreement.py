"""How far the inference graph's probabilities are from the plain module's, on one split."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import write
from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.models import create_model, load_exactly
from mambamic.training.data import load_split


@torch.inference_mode()
def main() -> None:
    """Run the comparison: the plain module in float32 is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder with the split, as a folder or zip")
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    checkpoint = load_checkpoint(args.checkpoint)
    config = checkpoint.config
    split = load_split(args.data, args.split, config.preprocess, progress=True)
    pixels, labels = split.pixels.numpy(), split.labels.numpy()

    model = create_model(config.architecture, len(config.classes)).eval()
    load_exactly(model, checkpoint.state_dict(), what="the weights do not fit")
    model.to(args.device)
    mean, std = (torch.tensor(v, device=args.device) * 255 for v in (config.mean, config.std))
    expected = []
    for batch in tqdm(split.pixels.split(args.batch), desc="plain"):
        x = ((batch.to(args.device) - mean) / std).permute(0, 3, 1, 2)
        logits = model(x) / (config.temperature or 1.0)
        expected.append(logits.softmax(1).cpu().numpy())
    plain = np.concatenate(expected)
    rows = []
    for dtype in args.dtypes:
        classifier = Classifier.load(checkpoint, device=args.device, dtype=dtype)
        assert classifier.fused
        got = classifier.probabilities(pixels)
        rows.append(
            {
                "dtype": dtype,
                "largest_difference": float(np.abs(got - plain).max()),
                "accuracy": round(float((got.argmax(1) == labels).mean()), 5),
                "other_labels": int((got.argmax(1) != plain.argmax(1)).sum()),
            }
        )
    accuracy = round(float((plain.argmax(1) == labels).mean()), 5)
    described = {"split": args.split, "images": len(split), "plain_accuracy": accuracy}
    write({"checkpoint": args.checkpoint.name, **described, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
