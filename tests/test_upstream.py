"""The published research code's files, read without running what they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mambamic.errors import CheckpointError
from mambamic.upstream import read_class_indices, read_weights

WEIGHTS = {"head.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "epoch": 3},
        {"state_dict": {f"module.{key}": value for key, value in WEIGHTS.items()}, "best": 0.9},
        {"model": {"state_dict": WEIGHTS}},
        {f"module.{key}": value for key, value in WEIGHTS.items()},
    ],
)
def test_forms(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[key], WEIGHTS[key]) for key in WEIGHTS)


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_not_run(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {**WEIGHTS, "x": Harmful()}
    torch.save(content, "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read .*state dict of tensors"):
        read_weights("x.pth")
    assert not Path("harmed").exists()


def test_whole_model_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\) alone"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{}, [1], {"epoch": 3}, {**WEIGHTS, "epoch": 3}, {"model": {}}])
def test_no_state_dict(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no state dict in it"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("part", [0, 1, 100, -20])
def test_damaged_file(part: int, tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[:part])
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read"):
        read_weights(tmp_path / "x.pth")


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("not weights at all\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "x.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_weights(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="No such file"):
        read_class_indices(tmp_path / "x.json")


def test_class_indices(tmp_path: Path) -> None:
    path = tmp_path / "class_indices.json"
    # As the training script writes them, and with ten and more in the order of numbers, not text.
    names = [f"class {index}" for index in range(12)]
    path.write_text(json.dumps({str(index): name for index, name in enumerate(names)}, indent=4))
    assert read_class_indices(path) == tuple(names)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"a": "0"}', '{"0": "a", "2": "b"}', '{"0": 1}'])
def test_other_class_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "class_indices.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"class_indices\.json cannot be used"):
        read_class_indices(path)
