"""``mambamic explain``, called as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mambamic.cli import main


@pytest.fixture
def cell(root: Path) -> str:
    return str(root / "examples" / "cell.png")


def test_it_writes_a_picture_and_says_what_it_shows(
    random_checkpoint: Path, cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "explained"
    assert main(["explain", str(random_checkpoint), cell, cell, "--out", str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == cell
    assert first.endswith(str(out / "cell.explained.png"))
    assert second.endswith(str(out / "cell-2.explained.png"))
    with Image.open(out / "cell.explained.png") as picture, Image.open(cell) as image:
        assert picture.width >= image.width
        assert picture.height > image.height


def test_json_and_files_that_cannot_be_read(
    random_checkpoint: Path, cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["explain", str(random_checkpoint), "missing.png", cell, "--out", str(tmp_path)]
    assert main([*call, "--class", "c", "--method", "integrated-gradients", "--json"]) == 1
    missing, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert missing["error"]["code"] == "decode_failed"
    assert (good["explained"], good["method"]) == ("c", "integrated-gradients")
    assert Path(good["overlay"]).is_file()
    assert set(good["probabilities"]) == set("abcdefgh")


def test_wrong_calls(
    random_checkpoint: Path, cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for wrong, named in (
        (["--class", "leucocyte"], "'leucocyte'"),
        (["--method", "grad-cam"], "mirror image"),
        (["--stage", "2"], "stage 2"),
        (["--out", str(tmp_path / "file")], "cannot be made"),
    ):
        call = ["explain", str(random_checkpoint), cell, "--out", str(tmp_path), *wrong]
        assert main(call) == 2
        assert named in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["explain", "--help"])
    assert status.value.code == 0
    assert "example:\n  mambamic explain " in capsys.readouterr().out
