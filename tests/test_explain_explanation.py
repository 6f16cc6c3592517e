from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mambamic import Classifier, create_model
from mambamic.checkpoint import Checkpoint, save_checkpoint
from mambamic.config import Config
from mambamic.errors import ShapeError, UsageError
from mambamic.explain.explanation import Question
from mambamic.explain.methods import grad_cam, occlusion
from mambamic.export.onnx_export import write_onnx

from .random_checkpoint import CLASSES

PIXELS = np.random.default_rng(7).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def mambamic(random_checkpoint: Path) -> Classifier:
    return Classifier.load(random_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def medmamba_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(3)
    model = create_model("medmamba_t", len(CLASSES))
    folder = tmp_path_factory.mktemp("medmamba") / "random"
    config = Config("medmamba_t", CLASSES, input_size=64)
    return save_checkpoint(folder, config, model.state_dict(), "# Random weights\n")


@pytest.fixture(scope="module")
def medmamba(medmamba_checkpoint: Checkpoint) -> Classifier:
    return Classifier.load(medmamba_checkpoint, device="cpu")


def test_the_predicted_class_is_explained_where_none_is_named(mambamic: Classifier) -> None:
    explanation = Question(mambamic).explain(PIXELS)
    (prediction,) = mambamic.predict([PIXELS])
    assert explanation.label == prediction.label
    assert explanation.method == "occlusion"
    target = CLASSES.index(prediction.label)
    np.testing.assert_allclose(explanation.heat, occlusion(mambamic, PIXELS, target), atol=1e-3)
    as_json = json.loads(json.dumps(explanation.as_json()))
    assert as_json.pop("explained") == prediction.label
    assert as_json.pop("method") == "occlusion"
    assert as_json == prediction.as_json()


def test_a_named_class_is_explained(mambamic: Classifier) -> None:
    chosen = Question(mambamic, "integrated-gradients", "c").explain(PIXELS)
    other = Question(mambamic, "integrated-gradients", "d").explain(PIXELS)
    assert (chosen.label, other.label) == ("c", "d")
    assert chosen.prediction == other.prediction
    assert not np.allclose(chosen.heat, other.heat)


def test_medmamba_is_explained_by_grad_cam(medmamba: Classifier) -> None:
    last = Question(medmamba, label="b").explain(PIXELS)
    assert last.method == "grad-cam"
    np.testing.assert_allclose(last.heat, grad_cam(medmamba, PIXELS, 1, 4), atol=1e-6)
    second = Question(medmamba, label="b", stage=2).explain(PIXELS)
    np.testing.assert_allclose(second.heat, grad_cam(medmamba, PIXELS, 1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"method": "lime"}, "'lime'.*occlusion"),
        ({"label": "leucocyte"}, "'leucocyte'.*a, b, c"),
        ({"method": "grad-cam"}, "mirror image.*occlusion"),
        ({"stage": 2}, "stage 2 with method occlusion"),
    ],
)
def test_what_has_no_answer_is_refused(
    mambamic: Classifier, asked: dict[str, str | int], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        Question(mambamic, **asked)  # type: ignore[arg-type]


def test_an_onnx_file_has_no_gradients(medmamba_checkpoint: Checkpoint, tmp_path: Path) -> None:
    onnx = Classifier.load(write_onnx(medmamba_checkpoint, tmp_path / "model.onnx"))
    assert Question(onnx).explain(PIXELS).method == "occlusion"
    for method in ("grad-cam", "integrated-gradients"):
        with pytest.raises(UsageError, match=r"no gradients.*occlusion"):
            Question(onnx, method)


def test_there_is_no_fifth_stage(medmamba: Classifier) -> None:
    with pytest.raises(UsageError, match=r"stage 5.*1, 2, 3 or 4"):
        Question(medmamba, stage=5)


def test_pixels_of_another_size_are_refused(mambamic: Classifier) -> None:
    with pytest.raises(ShapeError, match="64"):
        Question(mambamic).explain(PIXELS[:32])


def test_threads_share_one_plain_module(random_checkpoint: Path) -> None:
    classifier = Classifier.load(random_checkpoint, device="cpu")
    with ThreadPoolExecutor(4) as pool:
        modules = list(pool.map(lambda _: classifier.plain_module(), range(8)))
        question = Question(classifier, "integrated-gradients", "c")
        heats = list(pool.map(question.explain, [PIXELS] * 3))
    assert all(module is modules[0] for module in modules)
    assert not any(parameter.requires_grad for parameter in modules[0].parameters())
    for explanation in heats:
        np.testing.assert_allclose(explanation.heat, heats[0].heat, atol=1e-5)
