"""``mambamic info``, called as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mambamic.cli import main


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["info", "--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "example:\n  mambamic info mambamic_t\n" in out
    assert "exit status" in out


def test_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "mambamic_t", "--input-size", "64"]) == 0
    title, parameters, *table = capsys.readouterr().out.splitlines()
    assert title == "mambamic_t, 1000 classes, one image of 64 x 64 pixels"
    assert parameters.startswith("parameters  3,795,902 used; 4,321,310 as published")
    assert table[1].split() == [
        "output", "parameters", "multiply-adds", "state", "updates", "output", "for", "training",
    ]  # fmt: skip
    assert table[2].startswith("stem     16 x 16 x 96")


def test_a_checkpoint(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(random_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "mambamic_t"
    assert (found["input_size"], found["num_classes"]) == (64, 8)
    assert found["parameters_published"] - found["parameters"] == 4_321_310 - 3_795_902
    assert len(found["parts"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mambamic_x"],
            "model 'mambamic_x'; expected a checkpoint's folder, or one of mambamic_t",
        ),
        (["mambamic_t", "--input-size", "28"], "--input-size 28; expected at least 29"),
        (["CHECKPOINT", "--num-classes", "3"], "--num-classes 3; expected none"),
    ],
)
def test_calls_that_make_no_sense(
    arguments: list[str],
    message: str,
    random_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [str(random_checkpoint) if text == "CHECKPOINT" else text for text in arguments]
    assert main(["info", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 1
    assert "config.json cannot be read" in capsys.readouterr().err
