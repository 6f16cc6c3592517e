"""The record of where a figure was measured, as far as it changes the figure."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from mambamic._version import __version__


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return machine, driver and versions, as an object that JSON can hold.

    Args:
        device: Where it was measured; by default a GPU where there is one.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {
        "mambamic": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        return record | {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "convolutions": torch.backends.cudnn.allow_tf32,
            },
        }
    return record | {
        "device": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, None where nvidia-smi does not tell it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
