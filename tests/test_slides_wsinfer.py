from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mambamic.errors import CheckpointError, UsageError
from mambamic.slides.models import ModelChoice
from mambamic.slides.source import open_slide
from mambamic.slides.wsinfer import WsinferScorer, is_wsinfer, wsinfer_facts

from .slide_files import blobs, write_slide
from .slide_runs import only, score, table

MEAN, STD = [0.7, 0.6, 0.7], [0.2, 0.25, 0.2]


class Redness(nn.Module):
    """Outputs that can be worked out by hand."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].mean(dim=(1, 2))[:, None] * self.weight


def write_model(folder: Path, outputs: int = 2, **changes: Any) -> Path:
    folder.mkdir()
    config = {
        "spec_version": "1.0",
        "architecture": "redness",
        "num_classes": outputs,
        "class_names": [f"class {n}" for n in range(outputs)],
        "name": "redness",
        "patch_size_pixels": 100,
        "spacing_um_px": 0.5,
        "transform": [
            {"name": "Resize", "arguments": {"size": 32}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": MEAN, "std": STD}},
        ],
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    example = torch.zeros(1, 3, 32, 32)
    traced = torch.jit.trace(Redness(outputs).eval(), example)
    torch.jit.save(traced, str(folder / "torchscript_model.pt"))
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def _by_hand(pixels: np.ndarray, outputs: int) -> np.ndarray:
    red = (pixels[..., 0] / 255 - MEAN[0]) / STD[0]
    logits: np.ndarray = red.mean(axis=(1, 2))[:, None] * np.linspace(-1, 1, outputs)
    return logits


def test_the_config_says_how_tiles_are_cut_and_the_head_is_stated(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert is_wsinfer(folder)
    facts = wsinfer_facts(folder, "softmax")
    assert (facts.tile, facts.mpp, facts.classes) == (100, 0.5, ("class 0", "class 1"))
    assert facts.preprocess.input_size == 32
    assert facts.identity != wsinfer_facts(folder, "sigmoid").identity
    with pytest.raises(UsageError, match="does not say what its 2 outputs are"):
        wsinfer_facts(folder, None)


def test_one_output_has_no_softmax(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", outputs=1)
    with pytest.raises(UsageError, match="--head softmax for a model of 1 outputs"):
        wsinfer_facts(folder, "softmax")
    assert wsinfer_facts(folder, "sigmoid").head == "sigmoid"


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": ["a"]},
        {"transform": [{"name": "ColorJitter"}]},
        {"transform": [{"name": "Resize", "arguments": {"size": [32, 64]}}]},
        {"patch_size_pixels": "wide"},
        {"class_names": None},
    ],
)
def test_a_config_that_would_change_the_scores_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError):
        wsinfer_facts(write_model(tmp_path / "m", **changes), "softmax")


def test_its_code_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    with pytest.raises(UsageError, match="a program that runs with your rights"):
        ModelChoice(folder, "cpu", head="softmax").load()


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_scores_are_those_of_the_model(tmp_path: Path, head: str) -> None:
    folder = write_model(tmp_path / "m", outputs=3)
    scorer = WsinferScorer(folder, wsinfer_facts(folder, head), "cpu", trust=True)
    pixels = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    logits = torch.from_numpy(_by_hand(pixels, 3))
    expected = logits.softmax(1) if head == "softmax" else logits.sigmoid()
    assert np.abs(scorer.score(pixels).probabilities - expected.numpy()).max() < 1e-5


def test_outputs_of_another_number_are_an_error(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    folder = write_model(tmp_path / "m", class_names=names, num_classes=3)
    scorer = WsinferScorer(folder, wsinfer_facts(folder, "softmax"), "cpu", trust=True)
    with pytest.raises(Exception, match=r"outputs of shape \(2, 2\)"):
        scorer.score(np.zeros((2, 32, 32, 3), np.uint8))


def test_embeddings_and_heads_are_refused_where_there_are_none(
    tmp_path: Path, random_checkpoint: Path
) -> None:
    with pytest.raises(UsageError, match="--embeddings"):
        ModelChoice(write_model(tmp_path / "m"), embeddings=True, head="sigmoid").facts()
    with pytest.raises(UsageError, match="states its own"):
        ModelChoice(random_checkpoint, head="sigmoid").facts()


def test_a_slide_is_scored_with_it_from_end_to_end(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    slide = write_slide(tmp_path / "s.tiff", (1024, 1024), 2, blobs([(500, 500, 300)]), mpp=0.25)
    common = (slide, "--model", folder, "--out", tmp_path / "out", "--tissue", "none")
    unstated = score(*common)
    assert unstated.returncode == 2
    assert "--head" in unstated.stderr
    distrusted = score(*common, "--head", "softmax")
    assert distrusted.returncode == 2
    assert "--trust" in distrusted.stderr
    done = score(*common, "--head", "softmax", "--trust")
    assert done.returncode == 0, done.stderr
    rows = table(only(tmp_path / "out"))
    assert rows.num_rows == 25, "tiles of 100 pixels at 0.5 are 200 pixels at 0.25"
    assert rows["level"].to_pylist() == [1] * 25
    opened = open_slide(slide)
    row = rows.to_pylist()[7]
    tile = opened.read(row["x"], row["y"], 1, (100, 100)).resize(
        (32, 32), Image.Resampling.BILINEAR
    )
    opened.close()
    expected = torch.from_numpy(_by_hand(np.asarray(tile)[None], 2)).softmax(1)[0]
    assert row["probability_class 1"] == pytest.approx(float(expected[1]), abs=1e-5)


def test_a_model_that_gives_no_numbers_fails_the_slide_and_says_so(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "torchscript_model.pt"
    module = torch.jit.load(str(weights))
    with torch.no_grad():
        module.weight.fill_(float("nan"))
    torch.jit.save(module, str(weights))
    slide = write_slide(tmp_path / "s.tiff", (512, 512), 1, blobs([(250, 250, 200)]))
    done = score(
        slide, "--model", folder, "--out", tmp_path / "out", "--head", "softmax", "--trust"
    )
    assert done.returncode == 1
    assert "probabilities for this tile are not finite" in done.stderr
    assert "Traceback" not in done.stderr
    rows = table(only(tmp_path / "out"))
    assert set(rows["status"].to_pylist()) == {"not_finite"}
    assert rows["top_class"].null_count == rows.num_rows
    assert (only(tmp_path / "out") / "summary.json").is_file()
