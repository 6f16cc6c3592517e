"""``mambamic onnx``, as it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambamic.cli import main


def test_writes_and_verifies(
    random_checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    image = str(root / "examples" / "cell.png")
    command = ["onnx", str(random_checkpoint), str(out)]
    assert main([*command, "--verify", "--images", image]) == 0
    printed = capsys.readouterr().out
    for batch in (1, 2, 3, 8):
        assert f"batch {batch}: " in printed
    assert "9 images" in printed
    assert "\nwithin 1e-05 of torch" in printed
    assert main(command) == 2
    assert "give --force" in capsys.readouterr().err
    assert main([*command, "--force", "--float-input"]) == 0
    assert main(["predict", str(out), image]) == 1
    assert "float32 NCHW" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.bin"], "ends in .onnx"),
        (["model.onnx", "--images", "x.png"], "add --verify"),
        (["model.onnx", "--verify", "--images", "x.png"], "x.png cannot be read"),
    ],
)
def test_wrong_calls(
    random_checkpoint: Path,
    more: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["onnx", str(random_checkpoint), *more]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_before_the_images_are_read(
    random_checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    images = [str(root / "examples" / "cell.png"), str(tmp_path / "text.png")]
    out = tmp_path / "model.onnx"
    assert main(["onnx", str(random_checkpoint), str(out), "--verify", "--images", *images])
    assert f"{images[1]}: 8 bytes that are not an image" in capsys.readouterr().err
    assert not out.exists()
