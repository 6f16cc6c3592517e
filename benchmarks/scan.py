"""Time the scan alone, forward and backward, on the shapes of both networks at 224 pixels."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import median_ms, write
from mambamic.kernels import selective_scan_2d

# Images (times four chunks for MambaMIC), side, d_inner, dt_rank: the four stages of each.
SHAPES = {
    "mambamic": [(4, 56, 24, 1), (4, 28, 48, 2), (4, 14, 96, 3), (4, 7, 192, 6)],
    "medmamba": [(1, 56, 96, 3), (1, 28, 192, 6), (1, 14, 384, 12), (1, 7, 768, 24)],
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    rows = []
    for family, stages in SHAPES.items():
        for chunks, side, d, rank in stages:
            size = (args.batch * chunks, side, side)
            image = [torch.randn(*size, d), torch.randn(*size, 4, rank + 32)]
            weights = [
                torch.randn(4, d, rank) * rank**-0.5,
                torch.rand(4, d) * 4 - 5,
                -torch.arange(1.0, 17).repeat(4, d, 1),
                torch.ones(4, d),
            ]
            inputs = [t.to(args.device, dtype) for t in image]
            inputs += [t.to(args.device) for t in weights]
            with torch.inference_mode():
                forward = median_ms(partial(selective_scan_2d, *inputs))
            tracked = [t.requires_grad_() for t in inputs]
            y = selective_scan_2d(*tracked)
            grad = torch.randn_like(y)
            gradients = partial(torch.autograd.grad, y, tracked, grad, retain_graph=True)
            backward = median_ms(gradients)
            rows.append(
                {
                    "network": family,
                    "shape (B, K, D, L)": [size[0], 4, d, side * side],
                    "forward_ms": round(forward, 3),
                    "backward_ms": round(backward, 3),
                }
            )
    write({"dtype": args.dtype, "batch": args.batch, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
