"""Time training steps, augmentation and optimiser included, on random pixels on the device."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.common import median_ms, write
from mambamic.models import create_model
from mambamic.training.augment import Augmentation


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="mambamic_t")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(args.arch, 8).to(device)
    augmentation = Augmentation((0.5,) * 3, (0.5,) * 3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    pixels = torch.randint(0, 256, (args.batch, 224, 224, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 8, (args.batch,), device=device)
    network = torch.compile(model) if args.compile else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            images = augmentation(pixels)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    whole = median_ms(step, repeats=args.repeats)
    augment = median_ms(lambda: augmentation(pixels), repeats=args.repeats)
    write(
        {
            "arch": args.arch,
            "batch": args.batch,
            "compiled": args.compile,
            "dtype": "bfloat16 autocast" if device.type == "cuda" else "float32",
            "step_ms": round(whole, 2),
            "of which augmentation_ms": round(augment, 2),
            "images_per_second": round(args.batch / whole * 1e3),
        },
        args.out,
    )
    if args.profile:
        with torch.profiler.profile() as profile:
            step()
            torch.cuda.synchronize()
        table = profile.key_averages().table(
            sort_by="self_device_time_total", row_limit=45, max_name_column_width=90
        )
        print(table)


if __name__ == "__main__":
    main()
