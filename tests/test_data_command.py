"""``mambamic data``, called as a user calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambamic.cli import main


@pytest.fixture
def tissue(tmp_path: Path) -> Path:
    """Three classes, one channel, no fault."""
    images = np.random.default_rng(0).integers(0, 256, (18, 28, 28), np.uint8)
    labels = np.arange(18, dtype=np.uint8)[:, None] % 3
    arrays: dict[str, Any] = {}
    for index, split in enumerate(("train", "val", "test")):
        part = slice(6 * index, 6 * index + 6)
        arrays |= {f"{split}_images": images[part], f"{split}_labels": labels[part]}
    np.savez_compressed(tmp_path / "tissue.npz", **arrays)
    return tmp_path / "tissue.npz"


@pytest.mark.parametrize("action", ["", "check", "stats"])
def test_help_has_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["data", *([action] if action else []), "--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "example:\n  mambamic data check " in out
    assert "exit status" in out


def test_a_good_data_set(tissue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tissue)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tissue}: 3 classes\n")
    assert "train: array L (6); all 28 x 28 pixels" in captured.out
    assert captured.err == ""


def test_names_of_classes(tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("duct\ntubule\npodocyte\n")
    assert main(["data", "check", str(tissue), "--classes", str(names), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["duct", "tubule", "podocyte"]
    shutil.copy(names, tissue.with_suffix(".classes.txt"))
    assert main(["data", "check", str(tissue), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["duct", "tubule", "podocyte"]


def test_a_bad_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/x.png").write_bytes(b"no")
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "  unreadable files in train: 1\n    train/a/x.png: 2 bytes" in out


def test_statistics(tissue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.load(tissue)["train_images"] / 255
    assert main(["data", "stats", str(tissue), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "mean": [round(images.mean(), 4)] * 3,
        "std": [round(images.std(), 4)] * 3,
        "images": 6,
        "pixels": 6 * 28 * 28,
    }
    assert main(["data", "stats", str(tissue)]) == 0
    comment, mean, std = capsys.readouterr().out.splitlines()
    assert comment == "# 6 images, 4704 pixels of split train"
    assert mean == f"mean = {found['mean']}"
    assert std == f"std = {found['std']}"
    assert main(["data", "stats", str(tissue), "--split", "val", "--input-size", "10"]) == 0
    assert capsys.readouterr().out.startswith("# 6 images, 600 pixels of split val")


@pytest.mark.parametrize(
    "argv", [["data"], ["data", "look"], ["data", "check"], ["data", "stats", "x", "--input-size"]]
)
def test_a_wrong_call(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(argv)
    assert status.value.code == 2
    assert "usage: mambamic data" in capsys.readouterr().err


def test_data_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("mambamic data: nowhere has none of train, val, test")


def test_it_needs_no_torch(tissue: Path, root: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from mambamic.cli import main; sys.exit(main(['data', 'check', {str(tissue)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no problems: every file is readable" in done.stdout
