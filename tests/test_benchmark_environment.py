"""The record of where a figure was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mambamic import __version__
from mambamic.benchmark.environment import driver_version, environment


def test_of_a_cpu() -> None:
    record = environment(torch.device("cpu"))
    assert json.loads(json.dumps(record)) == record
    assert record["mambamic"] == __version__
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert record["device"]
    assert "tf32" not in record


def test_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None


@pytest.mark.gpu
def test_of_a_gpu() -> None:
    record = environment()
    assert record["device"] == torch.cuda.get_device_name()
    assert record["cuda"] == torch.version.cuda
    assert re.fullmatch(r"\d+\.[\d.]+", record["driver"])
    assert record["tf32"] == {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }
