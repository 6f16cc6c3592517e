"""Checkpoints: whole or not at all, and never with other weights than stated."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambamic import create_model
from mambamic.checkpoint import FILES, WEIGHTS_FILE, load_checkpoint, save_checkpoint
from mambamic.config import Config
from mambamic.errors import CheckpointError, UsageError

CONFIG = Config(architecture="mambamic_t", classes=("a", "b"))
KEPT = ("A_logs", "Ds", "dt_projs_bias", "skip_scale", "running_mean", "running_var")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return create_model("mambamic_t", 2).state_dict()


@pytest.fixture
def folder(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))


def test_there_and_back(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells"
    saved = save_checkpoint(path, CONFIG, weights, "# Cells\n")
    opened = load_checkpoint(path)
    assert opened == saved
    assert opened.config.classes == ("a", "b")
    assert opened.card() == "# Cells\n"
    data = (path / WEIGHTS_FILE).read_bytes()
    assert opened.config.weights_sha256 == hashlib.sha256(data).hexdigest()
    loaded = opened.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert sorted(entry.name for entry in tmp_path.rglob("*") if entry.is_file()) == sorted(FILES)


def test_half_keeps_what_needs_range(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    opened = save_checkpoint(tmp_path / "half", CONFIG, weights, "", half=True)
    stored, loaded = opened.state_dict(as_stored=True), opened.state_dict()
    halves = {key for key, tensor in stored.items() if tensor.dtype == torch.float16}
    kept = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    counters = {key for key, tensor in stored.items() if tensor.dtype == torch.int64}
    assert kept == {key for key in weights if key.endswith(KEPT)}
    assert counters == {key for key in weights if key.endswith("num_batches_tracked")}
    assert halves | kept | counters == weights.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == weights[key].dtype
        torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-7)
        if key not in halves:
            assert torch.equal(tensor, weights[key])


def test_half_keeps_what_would_overflow(tmp_path: Path) -> None:
    opened = save_checkpoint(tmp_path / "x", CONFIG, {"w": torch.tensor([1e6])}, "", half=True)
    assert opened.state_dict(as_stored=True)["w"].dtype == torch.float32


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    opened = save_checkpoint(tmp_path / "x", CONFIG, {"a": matrix, "b": matrix.T}, "")
    assert torch.equal(opened.state_dict()["b"], matrix.T)


def test_other_weights_are_refused(folder: Path) -> None:
    opened = load_checkpoint(folder)
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"has SHA-256 .* as config\.json states"):
        load_checkpoint(folder)
    # Also when they were exchanged after opening.
    with pytest.raises(CheckpointError, match="has SHA-256"):
        opened.state_dict()


def test_right_hash_of_no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"no tensors")
    stated = json.loads((folder / "config.json").read_text())
    stated["weights_sha256"] = hashlib.sha256(b"no tensors").hexdigest()
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(folder).state_dict()


@pytest.mark.parametrize("name", ["config.json", WEIGHTS_FILE])
def test_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_checkpoint(folder)


def test_missing_card(folder: Path) -> None:
    (folder / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read"):
        load_checkpoint(folder).card()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        load_checkpoint(tmp_path / "nothing")


def test_the_folder_of_a_run_in_place_of_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "checkpoint")
    with pytest.raises(CheckpointError, match=f"config.json cannot be .*; give {run}/checkpoint$"):
        load_checkpoint(run)


def test_checkpoint_is_replaced(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_checkpoint(folder, CONFIG, weights, "# Second\n")
    assert load_checkpoint(folder).card() == "# Second\n"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_replacement_leaves_the_old_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the two renames, at the one moment when neither is in place."""
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    before = load_checkpoint(folder)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, CONFIG, weights, "# Second\n")
    after = load_checkpoint(folder)
    assert after.config == before.config
    assert after.card() != "# Second\n"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_other_files_are_not_deleted(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt is in the way"):
        save_checkpoint(folder, CONFIG, {}, "")
    with pytest.raises(UsageError, match="in the way"):
        save_checkpoint(folder / "notes.txt", CONFIG, {}, "")
    assert (folder / "notes.txt").read_text() == "mine"
    assert load_checkpoint(folder).state_dict()


def test_torch_free(random_checkpoint: Path, root: Path) -> None:
    code = (
        "import sys; from mambamic.checkpoint import load_checkpoint\n"
        "print(load_checkpoint(sys.argv[1]).config.architecture, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(random_checkpoint)],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["mambamic_t", "False"]
