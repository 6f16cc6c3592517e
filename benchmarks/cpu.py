"""Time the CPU kernels: all scans of one image, and one image through the inference graph.

The yardsticks run in turn with what is measured, in the same process and on the same threads:
for the scan a plain C loop, compiled for this processor, that does the recurrence alone; for the
graph the plain module with the native scan, in float32. The scan is float32; the graph is timed
with matrix products in float32 and, where the processor has AMX, in bfloat16.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write
from mambamic.benchmark.scan import SHAPES
from mambamic.graph.cpu import CpuGraph
from mambamic.kernels import cpu
from mambamic.models import VARIANTS, create_model, set_scan_backend

STATES, DIRECTIONS = 16, 4
DEPTHS = (2, 2, 4, 2)  # of the variants T
SOURCE = Path(__file__).with_name("plain_scan.c")


def plain_scan() -> ctypes.CDLL:
    """Compile the yardstick's loop for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "plain_scan.so")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(SOURCE), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def plain_work(library: ctypes.CDLL, images: int, side: int, d: int) -> Callable[[], object]:
    """Return one call of the plain loop, whose inputs are already in the order of the scans."""
    sequences, length = images * DIRECTIONS, side * side
    x, step = torch.randn(sequences, length, d), torch.rand(sequences, length, d) * 0.1
    b, c = (torch.randn(sequences, length, STATES) for _ in range(2))
    decay = -torch.arange(1.0, STATES + 1).repeat(DIRECTIONS, d, 1) * 1.4427
    y = torch.empty(sequences, length, d)

    def work(tensors: tuple[Tensor, ...] = (x, step, decay, b, c, y)) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        sizes = [ctypes.c_int64(size) for size in (sequences, length, d)]
        library.plain_scan(*sizes, *pointers)

    return work


def native_work(images: int, side: int, d: int, rank: int) -> Callable[[], object]:
    """Return one call of the native scan, from an image and its projections to the merged y."""
    inputs = (
        torch.randn(images, side, side, d),
        torch.randn(images, side, side, DIRECTIONS, rank + 2 * STATES),
        torch.randn(DIRECTIONS, d, rank) * rank**-0.5,
        torch.rand(DIRECTIONS, d) * 4 - 5,
        -torch.arange(1.0, STATES + 1).repeat(DIRECTIONS, d, 1),
        torch.ones(DIRECTIONS, d),
    )
    return lambda: cpu.forward(*inputs)


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time several functions in turn, so that what else the machine does falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 3):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if repeat >= 3:  # the first ones warm up
                times[name].append((time.perf_counter() - begun) * 1e3)
    return times


def compare(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Return medians and least times in ms, and the ratio of the first to the second."""
    times = in_turn(works, repeats)
    first, second = (statistics.median(values) for values in times.values())
    return {
        **{f"{name}_ms": round(statistics.median(values), 3) for name, values in times.items()},
        **{f"{name}_least_ms": round(min(values), 3) for name, values in times.items()},
        "ratio": round(first / second, 3),
    }


def each_as_often(works: list[Callable[[], object]]) -> Callable[[], object]:
    """Return one call of all stages' functions, each as often as its stage has blocks."""

    def call() -> None:
        for work, depth in zip(works, DEPTHS, strict=True):
            for _ in range(depth):
                work()

    return call


def scan_rows(repeats: int) -> list[dict[str, Any]]:
    """Time all scans of one image of either network against the plain loop."""
    library = plain_scan()
    rows = []
    for network, stages in SHAPES.items():
        works = {
            "scan": each_as_often([native_work(*shape) for shape in stages]),
            "plain_loop": each_as_often([plain_work(library, *shape[:3]) for shape in stages]),
        }
        rows.append({"network": network, **compare(works, repeats)})
    return rows


def graph_row(name: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time one image through the inference graph against the plain module with the native scan."""
    model = create_model(name, 8).eval().requires_grad_(False)
    set_scan_backend(model, "cpu")
    begun = time.perf_counter()
    graph = CpuGraph(model, dtype)
    built = time.perf_counter() - begun
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    scale, shift = torch.full((3,), 0.017), torch.full((3,), -2.0)

    def plain() -> Tensor:
        x = pixels.permute(0, 3, 1, 2) * scale.view(3, 1, 1) + shift.view(3, 1, 1)
        logits: Tensor = model(x)
        return logits

    works = {"graph": lambda: graph(pixels, scale, shift), "plain_module": plain}
    row = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "build_ms": round(built * 1e3),
    }
    return {**row, **compare(works, repeats)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["mambamic_t"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with torch.inference_mode():
        scan = scan_rows(args.repeats)
        dtypes = [torch.float32, *([torch.bfloat16] if cpu.has_bfloat16() else [])]
        graph = [graph_row(name, dtype, args.repeats) for name in args.models for dtype in dtypes]
    results = {"level": cpu.level(), "warmup": 3, "repeats": args.repeats}
    write({**results, "scan": scan, "graph": graph}, args.out)


if __name__ == "__main__":
    main()
