"""Training steps, as a run takes them: from pixels on the device to updated weights."""

from __future__ import annotations

import importlib
import statistics
from typing import Any

import torch

from mambamic.benchmark.timing import Timing, device_ms

INPUT_SIZE = 224


def check_packages() -> None:
    """Import what only training needs, so that its absence shows before anything is measured.

    Raises:
        ModuleNotFoundError: Lightning or kornia is not installed.
    """
    importlib.import_module("mambamic.training.step")


def measure(
    architecture: str,
    batch: int,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    timing: Timing,
) -> dict[str, Any]:
    """Time whole steps on random pixels.

    Args:
        architecture: A variant's name.
        batch: Images per step.
        backend: Of the scan.
        device: Where.
        dtype: Of autocast; float32 for none.
        timing: Of steps.
    """
    # Brings Lightning and kornia, which nothing else here needs.
    from mambamic.training.fit import quiet
    from mambamic.training.step import make_step

    step = make_step(architecture, batch, device, dtype, backend, size=INPUT_SIZE)
    with quiet():
        took = statistics.median(device_ms(step, timing, device))
    return {
        "batch": batch,
        "ms_per_step": round(took, 3),
        "images_per_second": round(batch / took * 1e3, 2),
    }
