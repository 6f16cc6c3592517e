"""What the scripts here share: the record of where they ran, and its file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambamic.benchmark.environment import environment
from mambamic.benchmark.timing import Timing, device_ms


def median_ms(work: Callable[[], object], *, warmup: int = 5, repeats: int = 20) -> float:
    """Return the median time of a call in milliseconds, by device events on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return statistics.median(device_ms(work, Timing(warmup, repeats), device))


def write(results: dict[str, Any], out: Path | None) -> None:
    """Print the results as JSON, and write them where asked."""
    text = json.dumps(environment() | results, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
