"""Time training steps, augmentation and optimiser included, on random pixels on the device."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common import median_ms, write
from mambamic.training.step import make_step


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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step = make_step(args.arch, args.batch, device, dtype, compiled=args.compile)
    whole = median_ms(step, repeats=args.repeats)
    write(
        {
            "arch": args.arch,
            "batch": args.batch,
            "compiled": args.compile,
            "dtype": "bfloat16 autocast" if device.type == "cuda" else "float32",
            "step_ms": round(whole, 2),
            "images_per_second": round(args.batch / whole * 1e3),
        },
        args.out,
    )
    if args.profile:
        with torch.profiler.profile() as profile:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        table = profile.key_averages().table(
            sort_by=f"self_{device.type}_time_total", row_limit=45, max_name_column_width=90
        )
        print(table)


if __name__ == "__main__":
    main()
