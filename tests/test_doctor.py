from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mambamic import doctor, kernels
from mambamic._version import __version__
from mambamic.cli import main
from mambamic.doctor import GpuFacts, judge_compiler, judge_gpu
from setup import find_compiler

H200 = (("cuda:0 NVIDIA H200", (9, 0)),)


def test_the_report_is_json_and_names_each_backend() -> None:
    report = doctor.examine()
    assert json.loads(json.dumps(report)) == report
    assert report["mambamic"] == __version__
    compute = report["compute"]
    assert set(compute["backends"]) == set(kernels.status())
    for backend in compute["backends"].values():
        assert backend["detail"]
    assert compute["backends"][compute["backend"]]["available"]
    assert report["serving"]["java"]["release"] >= 17
    assert report["serving"]["problems"] == []


def test_the_text_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambamic.launcher.java.MINIMUM", 999)
    report = doctor.examine()
    report["compute"] = {"error": "no torch; run pip install 'mambamic[torch]'"}
    text = "\n".join(doctor.lines(report))
    assert "999 or newer" in text
    assert "mambamic[torch]" in text
    assert "ready" not in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"mambamic {__version__}" in text
    assert "auto uses" in text
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mambamic"] == __version__


def diagnose(package: Path, **environment: str) -> dict[str, Any]:
    """Run the command in a process of its own with another environment; return its report."""
    done = subprocess.run(
        [sys.executable, "-m", "mambamic", "doctor", "--json"],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["compute"]["backend"] else 1)
    return report


def test_without_a_gpu(root: Path) -> None:
    compute = diagnose(root, CUDA_VISIBLE_DEVICES="")["compute"]
    assert compute["device"] == "cpu"
    assert compute["backend"] == "cpu"
    assert compute["gpu"].startswith("none: ")
    assert "used: the CPU; lost: the speed of a GPU" in compute["gpu"]
    if torch.cuda.is_available():
        assert "CUDA_VISIBLE_DEVICES='' hides every GPU" in compute["gpu"]
        assert compute["gpu"].endswith("remedy: unset it")


@pytest.mark.gpu
def test_with_a_gpu() -> None:
    compute = doctor.examine()["compute"]
    name = torch.cuda.get_device_name()
    assert compute["gpu"].startswith(f"cuda:0 {name}")
    assert compute["gpu"].endswith("used: the GPU; lost: nothing")


def test_without_a_compiler(root: Path, tmp_path: Path) -> None:
    compute = diagnose(root, PATH=str(tmp_path))["compute"]
    assert compute["compiler"].startswith("none on PATH; used: none, the CPU scan is built already")
    assert compute["compiler"].endswith("lost: nothing")
    assert compute["backends"]["cpu"]["available"]


def test_without_a_compiler_and_unbuilt(root: Path, tmp_path: Path) -> None:
    """A copy of the package as it is before it is built."""
    unbuilt = shutil.ignore_patterns("_scan2d.so", "__pycache__")
    shutil.copytree(root / "mambamic", tmp_path / "mambamic", ignore=unbuilt)
    compute = diagnose(tmp_path, PATH=str(tmp_path), CUDA_VISIBLE_DEVICES="")["compute"]
    assert compute["compiler"].startswith("none on PATH; the CPU scan is missing (the native lib")
    assert compute["compiler"].endswith(
        "lost: models on the CPU; building it fetches ziglang, a compiler from pip"
    )
    assert compute["backend"] is None


def test_with_an_older_driver(root: Path, tmp_path: Path) -> None:
    """A library in the driver's place that says what the driver for CUDA 11.2 says."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C compiler here to build a library that stands for an older driver")
    source = tmp_path / "driver.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 11020; return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    compute = diagnose(root, LD_LIBRARY_PATH=str(tmp_path))["compute"]
    assert compute["cuda_of_driver"] == "11.2"
    assert compute["device"] == compute["backend"] == "cpu"
    why = (
        "is here, but torch is built without CUDA"
        if torch.version.cuda is None
        else f"is too old for torch's CUDA {torch.version.cuda}"
    )
    assert compute["gpu"].startswith(f"none: a driver for CUDA 11.2 {why}; used: the CPU; lost: ")
    assert compute["gpu"].endswith("install torch for CUDA 11")


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (
            GpuFacts(None, (13, 0)),
            "none: no NVIDIA driver is loaded; used: the CPU; lost: the speed of a GPU",
        ),
        (
            GpuFacts((12, 2), (13, 0)),
            "none: a driver for CUDA 12.2 is too old for torch's CUDA 13.0; used: the CPU; lost: "
            "the speed of a GPU; remedy: update the driver to 580 or newer, or install torch for "
            "CUDA 12",
        ),
        (
            GpuFacts((12, 2), (14, 0)),
            "none: a driver for CUDA 12.2 is too old for torch's CUDA 14.0; used: the CPU; lost: "
            "the speed of a GPU; remedy: update the driver, or install torch for CUDA 12",
        ),
        (
            GpuFacts((13, 0), None),
            "none: a driver for CUDA 13.0 is here, but torch is built without CUDA; used: the CPU; "
            "lost: the speed of a GPU; remedy: install torch for CUDA 13",
        ),
        (
            GpuFacts((13, 0), (12, 8)),
            "none: a driver for CUDA 13.0 is here, but torch finds no GPU; used: the CPU; lost: "
            "the speed of a GPU; remedy: see what nvidia-smi says",
        ),
        (
            GpuFacts((13, 0), (13, 0), visible="7"),
            "none: CUDA_VISIBLE_DEVICES='7' hides every GPU; used: the CPU; lost: the speed of a "
            "GPU; remedy: unset it",
        ),
        (
            GpuFacts((13, 0), (13, 0), H200, (7, 5)),
            "cuda:0 NVIDIA H200; used: the GPU; lost: nothing",
        ),
        (
            GpuFacts((12, 4), (12, 8), H200, (5, 0)),
            "cuda:0 NVIDIA H200, with a driver for CUDA 12.4 and torch for the newer 12.8, of the "
            "same major version; used: the GPU; lost: nothing",
        ),
        (
            GpuFacts((13, 0), (13, 0), H200, (7, 5), scan_missing="cuda.core is not installed"),
            "cuda:0 NVIDIA H200, but its scan is missing; used: nothing, unless --device cpu is "
            "given; lost: the speed of a GPU; remedy: cuda.core is not installed",
        ),
        (
            GpuFacts((13, 0), (13, 0), (("cuda:0 Tesla V100", (7, 0)),), (7, 5)),
            "cuda:0 Tesla V100 has compute capability 7.0, torch is built for 7.5 and newer; used: "
            "that GPU, where every model fails; lost: the speed of a GPU; remedy: --device cpu, or "
            "torch for an older CUDA",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_is_said_of_a_gpu(facts: GpuFacts, line: str) -> None:
    assert judge_gpu(facts) == line


def test_what_is_said_of_a_compiler() -> None:
    assert judge_compiler("/usr/bin/cc", None).startswith("/usr/bin/cc; used: none, the CPU scan")
    assert judge_compiler("/usr/bin/cc", "not built; build it") == (
        "/usr/bin/cc; the CPU scan is missing (not built; build it); lost: models on the CPU"
    )


def test_the_oldest_architecture_of_a_build() -> None:
    assert doctor._oldest(["sm_90a", "sm_75", "sm_80", "compute_120"]) == (7, 5)
    assert doctor._oldest([]) == (0, 0)
