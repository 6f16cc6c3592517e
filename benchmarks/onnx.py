"""Time one image, and eight, as an ONNX file against torch: plain module and inference graph.

All three run in turn in one process, each on the same number of threads, from normalised or uint8
images of the model's size to results on the host; beside them the time to export and to load, the
size of the file, and the largest difference of a probability to the plain module. The processor
time of a run is taken too: it says what a run costs where other work keeps the cores busy.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from benchmarks.common import write
from mambamic import Classifier, create_model
from mambamic.checkpoint import save_checkpoint
from mambamic.config import Config
from mambamic.export.onnx_export import write_onnx
from mambamic.export.onnx_verify import random_pixels, verify
from mambamic.graph.plain import forward
from mambamic.models import VARIANTS

CLASSES = tuple("abcdefgh")
Run = Callable[[], object]


def measure(runs: dict[str, Run], repeats: int, warmup: int) -> dict[str, dict[str, float]]:
    """Return for each the median and least time and processor time, in ms; they take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(repeats + warmup):
        for name, run in runs.items():
            begun, worked = time.perf_counter(), time.process_time()
            run()
            took = time.perf_counter() - begun, time.process_time() - worked
            if repeat >= warmup:
                times[name].append(took)
    return {
        name: {
            "median_ms": round(statistics.median(wall for wall, _ in rows) * 1e3, 1),
            "least_ms": round(min(wall for wall, _ in rows) * 1e3, 1),
            "processor_ms": round(statistics.median(used for _, used in rows) * 1e3, 1),
        }
        for name, rows in times.items()
    }


def row(name: str, repeats: int, warmup: int, folder: Path) -> dict[str, Any]:
    """Measure one variant with random weights."""
    torch.manual_seed(0)
    model = create_model(name, len(CLASSES))
    config = Config(name, CLASSES)
    checkpoint = save_checkpoint(folder / name, config, model.state_dict(), "# Random weights\n")
    begun = time.perf_counter()
    path = write_onnx(checkpoint, folder / f"{name}.onnx")
    exported = time.perf_counter() - begun
    begun = time.perf_counter()
    onnx = Classifier.load(path)
    loaded = time.perf_counter() - begun
    graph = Classifier.load(checkpoint, "cpu", dtype="float32")
    plain = graph.plain_module()

    def runs(count: int) -> dict[str, Run]:
        pixels = random_pixels(count, config.input_size)
        images = torch.from_numpy(config.preprocess.normalise(pixels))

        def by_module() -> object:
            with torch.inference_mode():
                return forward(plain, images).logits.softmax(1)

        return {
            "plain torch": by_module,
            "inference graph": lambda: graph.outputs(pixels),
            "ONNX Runtime": lambda: onnx.outputs(pixels),
        }

    times = measure(runs(1), repeats, warmup)
    ratio = times["ONNX Runtime"]["median_ms"] / times["inference graph"]["median_ms"]
    found = list(verify(checkpoint, path, random_pixels(8, config.input_size)))
    return {
        "model": name,
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "export_s": round(exported, 2),
        "load_s": round(loaded, 2),
        "largest_difference": max(agreement.largest for agreement in found),
        "one_image": times,
        "eight_images": measure(runs(8), repeats, warmup),
        "onnx_to_graph": round(ratio, 2),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["mambamic_t"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, args.repeats, args.warmup, Path(folder)) for name in args.models]
    facts = {"onnxruntime": onnxruntime.__version__, "threads": torch.get_num_threads()}
    write({**facts, "warmup": args.warmup, "repeats": args.repeats, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
