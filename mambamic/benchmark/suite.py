"""A run of ``mambamic benchmark``: what was asked for, measured one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mambamic import kernels
from mambamic.benchmark import floors, inference, published, scan, training
from mambamic.benchmark.environment import environment
from mambamic.benchmark.timing import Timing
from mambamic.checkpoint import load_checkpoint
from mambamic.engine import TORCH_DTYPES, find_device
from mambamic.errors import MambamicError
from mambamic.models import create_model, set_scan_backend

PARTS = ("throughput", "latency", "scan", "training")
MODELS = ("mambamic_t", "mambamic_b", "medmamba_t")
BATCHES = {"cuda": (1, 32, 128, 256), "cpu": (1, 8)}
SCAN_IMAGES = {"cuda": 128, "cpu": 1}
TRAINING_BATCH = {"cuda": 256, "cpu": 8}
_PUBLISHED_SIZE = 224

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        models: Names of variants, which get random weights, and checkpoint folders.
        parts: Some of ``PARTS``.
        device: As of ``Classifier.load``.
        backend: As of ``Classifier.load``.
        dtype: As of ``Classifier.load``. A training step is taken in float32 on a CPU or where
            that is asked for, else in bfloat16.
        batches: Of the throughput; None for 1, 32, 128 and 256 on a GPU, 1 and 8 on a CPU.
        scan_images: Of the scans; None for 128 on a GPU, 1 on a CPU.
        training_batch: None for 256 on a GPU, 8 on a CPU.
        timing: Warm-up and repeats.
    """

    models: tuple[str, ...] = MODELS
    parts: tuple[str, ...] = PARTS
    device: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    batches: tuple[int, ...] | None = None
    scan_images: int | None = None
    training_batch: int | None = None
    timing: Timing = field(default_factory=Timing)


class Suite:
    """One run on one device; made anew for each."""

    def __init__(self, options: Options) -> None:
        self.options, self.timing = options, options.timing
        self.device = find_device(options.device)
        self.backend = kernels.resolve(options.backend, self.device)
        self.environment = environment(self.device)
        self.rates: dict[torch.dtype, floors.Rates] = {}
        self._work = cache(self._count)

    def run(self) -> dict[str, Any]:
        """Measure, and return the record, as an object that JSON can hold.

        What fails, for want of memory above all, is named under ``failed``; the rest is measured.

        Raises:
            MambamicError: A model is not there.
        """
        rows, failed = list[Row](), dict[str, str]()
        with tempfile.TemporaryDirectory() as folder:
            cases = self._cases(Path(folder))
            # None: no bar where standard error is not a terminal.
            with tqdm(total=len(cases), delay=2, disable=None) as bar:
                for name, case in cases:
                    bar.set_description(name)
                    try:
                        rows.append(case())
                    except (MambamicError, RuntimeError) as error:  # torch raises the latter
                        failed[name] = str(error).partition("\n")[0]
                    bar.update()
        if published.compared(self.environment["device"]):
            compare(rows)
        return self.environment | {
            "backend": self.backend,
            "backend_detail": kernels.describe(self.backend),
            "warmup": self.timing.warmup,
            "repeats": self.timing.repeats,
            "statistic": "median",
            "rates_per_second": {_name(dtype): asdict(self.rates[dtype]) for dtype in self.rates},
            "floors": floors.DEFINITIONS[self.device.type],
            "rows": rows,
            "failed": failed,
        }

    def _cases(self, folder: Path) -> list[tuple[str, Callable[[], Row]]]:
        options, kind = self.options, self.device.type
        if "training" in options.parts:
            training.check_packages()
        cases: list[tuple[str, Callable[[], Row]]] = []
        for model in options.models:
            checkpoint = inference.checkpoint_of(model, folder)
            architecture = load_checkpoint(checkpoint).config.architecture
            if "throughput" in options.parts:
                for batch in options.batches or BATCHES[kind]:
                    case = partial(self._inference, "throughput", model, checkpoint, batch)
                    cases.append((f"throughput {model} {batch}", case))
            if "latency" in options.parts:
                case = partial(self._inference, "latency", model, checkpoint, 1)
                cases.append((f"latency {model}", case))
            if "training" in options.parts:
                cases.append((f"training {model}", partial(self._training, model, architecture)))
        if "scan" in options.parts:
            for network, shapes in scan.SHAPES.items():
                for shape in shapes:
                    case = partial(self._scan, network, shape)
                    cases.append((f"scan {network} {shape}", case))
        return cases

    def _inference(self, part: str, model: str, checkpoint: Path, batch: int) -> Row:
        options = self.options
        device = str(self.device)
        classifier = inference.load(checkpoint, device, self.backend, options.dtype, batch)
        config, dtype = classifier.config, classifier.dtype
        if part == "throughput":
            measured = inference.throughput(classifier, self.timing)
            images, took = measured["images_per_call"], measured["ms_per_call"]
        else:
            measured = inference.latency(classifier, self.timing)
            images, took = 1, measured["p50_ms"]
        work = self._work(config.architecture, config.input_size)
        floor = self._rates(dtype).network_floor_ms(work, images)
        row = {"part": part, "model": Path(model).name, "architecture": config.architecture,
               "input_size": config.input_size, "dtype": _name(dtype)}  # fmt: skip
        return row | measured | {"floor_ms": _digits(floor), "times_floor": _digits(took / floor)}

    def _training(self, model: str, architecture: str) -> Row:
        batch = self.options.training_batch or TRAINING_BATCH[self.device.type]
        slow = self.device.type == "cpu" or self.options.dtype == "float32"
        dtype = torch.float32 if slow else torch.bfloat16
        measured = training.measure(
            architecture, batch, self.backend, self.device, dtype, self.timing
        )
        work = self._work(architecture, training.INPUT_SIZE)
        floor = self._rates(dtype).network_floor_ms(work, batch, training=True)
        row = {"part": "training", "model": Path(model).name, "architecture": architecture,
               "input_size": training.INPUT_SIZE, "dtype": _name(dtype)}  # fmt: skip
        ratio = measured["ms_per_step"] / floor
        return row | measured | {"floor_ms": _digits(floor), "times_floor": _digits(ratio)}

    def _scan(self, network: str, shape: scan.Shape) -> Row:
        images = self.options.scan_images or SCAN_IMAGES[self.device.type]
        usual = torch.float16 if self.device.type == "cuda" else torch.float32
        dtype = TORCH_DTYPES.get(self.options.dtype, usual)
        measured = scan.measure(shape, images, self.backend, self.device, dtype, self.timing)
        row: Row = {"part": "scan", "network": network, "dtype": _name(dtype), **measured}
        batch, n_directions, d_inner, length = measured["shape"]
        whole = (batch, n_directions, d_inner, length)
        for direction in ("forward", "backward"):
            found = self._rates(dtype).scan_floors_ms(
                whole, measured["dt_rank"], dtype.itemsize, backward=direction == "backward"
            )
            row[f"{direction}_floors_ms"] = {name: _digits(ms) for name, ms in found.items()}
            ratio = measured[f"{direction}_ms"] / max(found.values())
            row[f"{direction}_times_floor"] = _digits(ratio)
        return row

    def _rates(self, dtype: torch.dtype) -> floors.Rates:
        if dtype not in self.rates:
            self.rates[dtype] = floors.measure(self.device, dtype, self.timing)
        return self.rates[dtype]

    def _count(self, architecture: str, size: int) -> floors.Work:
        # On the CPU where its scan is there: a GPU would compile for the plain module first.
        slow = kernels.status()["cpu"] is not None
        device = self.device if slow else torch.device("cpu")
        model = create_model(architecture, 8).eval().to(device)
        set_scan_backend(model, "auto")
        return floors.count(model, torch.zeros(1, 3, size, size, device=device))


def compare(rows: list[Row]) -> None:
    """Set the published code's figure, and the speed-up, beside ours: at each model's best batch.

    Args:
        rows: Of one run on the kind of device that the published code was measured on.
    """
    batches = [row for row in rows if row["part"] == "throughput"]
    best = {row["model"]: row for row in sorted(batches, key=lambda row: row["images_per_second"])}
    for row in rows:
        found = _speedup(row)
        if found and (row["part"] != "throughput" or row is best[row["model"]]):
            row["published"], row["speedup"] = found[0], _digits(found[1])


def _speedup(row: Row) -> tuple[float, float] | None:
    """Return the published figure that belongs to a row, and how many times better ours is."""
    if row["part"] == "scan":
        theirs = published.SCAN.get(tuple(row["shape"])) if row["dtype"] == "float16" else None
        return (theirs, theirs / row["forward_ms"]) if theirs else None
    if row["input_size"] != _PUBLISHED_SIZE:
        return None
    if row["part"] == "latency":
        theirs = published.LATENCY.get(row["architecture"])
        return (theirs, theirs / row["p50_ms"]) if theirs else None
    figures = published.TRAINING if row["part"] == "training" else published.THROUGHPUT
    theirs = figures.get(row["architecture"])
    return (theirs, row["images_per_second"] / theirs) if theirs else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
