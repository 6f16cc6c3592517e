"""The command line, called as a user calls it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mambamic import Classifier, __version__
from mambamic.checkpoint import load_checkpoint
from mambamic.cli import COMMANDS, main
from mambamic.images import decode
from mambamic.models import create_model, load_exactly

OURS = ("predict", "import", "archive")


@pytest.fixture
def cell(root: Path) -> str:
    return str(root / "examples/cell.png")


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, Path]:
    """Weights as the published code saves them, unused tensors included, and its class file."""
    from tests.golden_fill import tensor_for

    stated = json.loads((root / "tests/golden/state_dict_shapes.json").read_text())["mambamic_t"]
    weights = {}
    for key, shape in stated.items():
        classes = [8, *shape[1:]] if key.startswith("head.") else shape
        weights[key] = torch.from_numpy(np.asarray(tensor_for(key, tuple(classes), 0)))
    folder = tmp_path_factory.mktemp("upstream")
    torch.save(weights, folder / "best.pth")
    names = {str(index): name for index, name in enumerate("abcdefgh")}
    (folder / "class_indices.json").write_text(json.dumps(names, indent=4))
    return folder / "best.pth", folder / "class_indices.json"


@pytest.mark.parametrize("command", OURS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([command, "--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  mambamic {command} " in out
    assert "exit status" in out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mambamic {__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["predict"], ["predict", "x"], ["archive"], ["import", "x.pth"]]
)
def test_wrong_call(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(argv)
    assert status.value.code == 2
    assert "usage: mambamic" in capsys.readouterr().err


def test_predict(
    random_checkpoint: Path, cell: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(data_dir / "odd_images/hopper_orientation_6.jpg")
    bad = str(data_dir / "odd_images/truncated_jpeg.jpg")
    call = ["predict", str(random_checkpoint), "--device", "cpu"]
    assert main([*call, cell, good]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    images = [decode(Path(path).read_bytes()) for path in (cell, good)]
    expected = Classifier.load(random_checkpoint, device="cpu").predict(images)
    assert first == [cell, expected[0].label, f"{expected[0].probability:.4f}"]
    assert second == [good, expected[1].label, f"{expected[1].probability:.4f}"]

    assert main([*call, cell, bad, "nothing.png", good, "--batch-size", "2"]) == 1
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == [cell, good]
    errors = captured.err.splitlines()
    assert errors[0].startswith(f"{bad}: a damaged image (image file is truncated")
    assert errors[1].startswith("nothing.png: it cannot be read (No such file")


def test_predict_json(
    random_checkpoint: Path, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(random_checkpoint), cell, __file__, "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    first, second = map(json.loads, captured.out.splitlines())
    expected = Classifier.load(random_checkpoint).predict([decode(Path(cell).read_bytes())])[0]
    assert first == {"image": cell, **expected.as_json()}
    assert second["image"] == __file__
    assert second["error"]["code"] == "decode_failed"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_cannot_be_printed(
    encoding: str, random_checkpoint: Path, cell: str, tmp_path: Path
) -> None:
    """One that is no UTF-8, and one of letters that the terminal may lack, before one like any."""
    odd = [os.fsdecode(b"caf\xe9.png"), "\u00e9\U0001f52c.png", "cell.png"]
    for name in odd:
        shutil.copy(cell, tmp_path / name)
    folder = tmp_path / "cells/train/blood"
    folder.mkdir(parents=True)
    (folder / odd[0]).write_bytes(b"no image")
    (folder / odd[1]).write_bytes(b"no image")

    def call(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "mambamic", *arguments],
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"},
        )
        assert b"Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout.decode(encoding)

    status, out = call("predict", str(random_checkpoint), *odd, "--json")
    assert (status, [json.loads(line)["image"] for line in out.splitlines()]) == (0, odd)
    status, out = call("predict", str(random_checkpoint), *odd)
    assert (status, len(out.splitlines())) == (0, 3)
    assert "caf\\udce9.png" in out
    status, out = call("data", "check", "cells", "--json")
    assert status == 1
    assert {
        Path(each["name"]).name for each in json.loads(out)["splits"]["train"]["unreadable"]
    } == set(odd[:2])
    status, out = call("data", "check", "cells")
    assert "caf\\udce9.png" in out


def test_a_batch_size_that_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["predict", "nowhere", "x.png", "--batch-size", "0"])
    assert status.value.code == 2
    assert "--batch-size: '0'; expected a whole number of at least 1" in capsys.readouterr().err


def test_a_missing_extra_is_named(root: Path) -> None:
    """In an environment without torch every command says what to install."""
    hide = "import sys; sys.modules['torch'] = None; sys.modules['pytorch_lightning'] = None\n"
    for call, extra in (("['predict', 'a', 'b']", "torch"), ("['train', '--help']", "torch")):
        code = hide + f"from mambamic.cli import main; sys.exit(main({call}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:  # a command whose help needs none of it
            assert "example" in done.stdout
            continue
        assert done.returncode == 2
        assert f"pip install 'mambamic[{extra}]'" in done.stderr


def test_a_reader_that_has_enough(random_checkpoint: Path, cell: str, root: Path) -> None:
    command = f"{sys.executable} -m mambamic predict {random_checkpoint} {cell} {cell} | head -c 5"
    done = subprocess.run(
        ["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False
    )
    assert len(done.stdout) == 5
    assert done.stderr == ""


@pytest.mark.parametrize("command", [("onnx",), ("archive", "--out")])
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("a_file/x.onnx", "a_file is a file; expected a folder for "),
        ("a_file/deeper/x.onnx", "a_file is a file; expected a folder for "),
        ("folder.onnx", "folder.onnx is a folder; expected a file to write; give "),
        (f"{'n' * 300}.onnx", " cannot be read or written (File name too long); expected a file"),
    ],
)
def test_a_path_that_cannot_be_written(
    command: tuple[str, ...],
    target: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a_file").write_text("in the way")
    (tmp_path / "folder.onnx").mkdir()
    name, *option = command
    # Told before the checkpoint is opened, and long before it is exported.
    assert main([name, "no checkpoint", *option, str(tmp_path / target), "--force"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("target", ["a_file/x", "a_file", "n" * 300])
def test_a_folder_that_cannot_be_made(
    target: str,
    upstream: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a_file").write_text("in the way")
    weights, classes = map(str, upstream)
    call = ["import", weights, "--arch", "mambamic_t", "--classes", classes, "--force"]
    assert main([*call, "--out", str(tmp_path / target)]) == 2
    assert "; expected " in capsys.readouterr().err


def test_a_disk_that_is_full(root: Path, cell: str, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "blood"
    folder.mkdir(parents=True)
    shutil.copy(cell, folder)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "mambamic", "data", "check", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            timeout=120,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "mambamic data: a file cannot be read or written (No space left on device); expected "
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "x.png"], 1, "cannot be read"),
        (["CHECKPOINT", "x.png", "--device", "tpu"], 2, "device 'tpu'"),
        (["CHECKPOINT", "x.png", "--device", "cuda:99"], 1, "is not here"),
    ],
)
def test_predict_that_cannot_start(
    arguments: list[str],
    status: int,
    message: str,
    random_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [str(random_checkpoint) if text == "CHECKPOINT" else text for text in arguments]
    assert main(["predict", *argv]) == status
    assert message in capsys.readouterr().err


def test_import(
    upstream: tuple[Path, Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.golden_fill import image_for

    weights, classes = map(str, upstream)
    out = tmp_path / "cells"
    call = ["import", weights, "--arch", "mambamic_t", "--classes", classes, "--out", str(out)]
    more = ["--input-size", "64", "--mpp", "0.1", "--mean", "0.7", "0.6", "0.5", "--licence", "MIT"]
    assert main([*call, *more]) == 0
    assert "8 classes" in capsys.readouterr().out
    opened = load_checkpoint(out)
    assert opened.config.classes == tuple("abcdefgh")
    assert (opened.config.input_size, opened.config.mpp) == (64, 0.1)
    assert (opened.config.mean, opened.config.std) == ((0.7, 0.6, 0.5), (0.5, 0.5, 0.5))
    assert "license: MIT" in opened.card()
    assert "research use only" in opened.card()

    golden = np.load(root / "tests/golden/golden.npz")
    cases = json.loads((root / "tests/golden/golden.json").read_text())
    case = next(case for case in cases if case["tag"] == "mambamic_t_c8_seed0_b2_64px")
    model = create_model(opened.config.architecture, len(opened.config.classes)).eval()
    load_exactly(model, opened.state_dict(), what="the imported weights")
    images = image_for(case["batch"], case["size"], case["seed"])
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits, golden[f"{case['tag']}/logits"], atol=1e-4)

    assert main(call) == 2
    assert "give --force" in capsys.readouterr().err
    assert main([*call, "--force", "--half"]) == 0
    assert load_checkpoint(out).state_dict(as_stored=True)["head.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"--arch": "mambamic_s"}, 1, "does not fit mambamic_s: key "),
        ({"--classes": "SHORT"}, 1, "names 7 classes; expected 8"),
        ({"--input-size": "5"}, 2, "'input_size' is 5"),
        ({"--mpp": "-1"}, 2, "'mpp' is -1.0"),
    ],
)
def test_import_that_does_not_fit(
    change: dict[str, str],
    status: int,
    message: str,
    upstream: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = tmp_path / "short.json"
    short.write_text(json.dumps({str(index): name for index, name in enumerate("abcdefg")}))
    options = {
        "--arch": "mambamic_t",
        "--classes": str(upstream[1]),
        "--out": str(tmp_path / "out"),
        **{key: str(short) if value == "SHORT" else value for key, value in change.items()},
    }
    argv = ["import", str(upstream[0]), *(text for pair in options.items() for text in pair)]
    assert main(argv) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_archive(
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["archive", str(random_checkpoint), "--name", "cells", "--version", "2.0"]
    assert main(call) == 0
    assert capsys.readouterr().out.startswith("cells.mar (")
    assert main(call) == 2
    assert "give --force" in capsys.readouterr().err
    assert main([*call, "--force"]) == 0
    assert main([*call, "--out", "sub/x.mar"]) == 0
    assert Path("sub/x.mar").read_bytes() == Path("cells.mar").read_bytes()


def test_archive_of_a_damaged_checkpoint(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(random_checkpoint, tmp_path / "copy")
    (Path(copy) / "model.safetensors").write_bytes(b"")
    assert main(["archive", str(copy), "--out", str(tmp_path / "x.mar")]) == 1
    assert "has SHA-256" in capsys.readouterr().err


def test_sample_is_what_its_script_draws(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "examples"))
    drawn = importlib.import_module("draw_cell").draw()
    with Image.open(root / "examples/cell.png") as committed:
        difference = np.abs(np.asarray(drawn, int) - np.asarray(committed, int))
    # Another version of Pillow may round another way.
    assert difference.mean() < 1
    assert (root / "examples/cell.png").stat().st_size < 120_000


def test_predict_with_embeddings(
    random_checkpoint: Path, cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(random_checkpoint), cell, "--embedding"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    classifier = Classifier.load(random_checkpoint, device="cpu")
    pixels = classifier.preprocess.pixels(decode(Path(cell).read_bytes()))
    (expected,) = classifier.embeddings(pixels[np.newaxis])
    np.testing.assert_allclose(json.loads(line)["embedding"], expected, rtol=1e-3, atol=1e-5)
