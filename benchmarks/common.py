"""What every benchmark shares: the clock and the record of where it ran."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mambamic import __version__


def environment() -> dict[str, Any]:
    """Return machine, driver and versions, as far as they change a figure."""
    record: dict[str, Any] = {
        "mambamic": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        record |= {
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        record["device"] = names[0] if names else platform.machine()
    return record


def median_ms(work: Callable[[], object], *, warmup: int = 5, repeats: int = 20) -> float:
    """Return the median time of a call in milliseconds, by device events on a GPU."""
    for _ in range(warmup):
        work()
    times: list[float] = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            work()
            times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def write(results: dict[str, Any], out: Path | None) -> None:
    """Print the results as JSON, and write them where asked."""
    text = json.dumps(environment() | results, indent=2)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
