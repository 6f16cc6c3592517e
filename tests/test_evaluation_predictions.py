"""From a split and a classifier to predictions beside the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mambamic import Classifier, create_model
from mambamic.checkpoint import save_checkpoint
from mambamic.config import Config
from mambamic.errors import DataError
from mambamic.evaluation.predictions import Predictions, predict, truth_of

CONFIG = Config("mambamic_t", ("a", "b", "c"))


def test_truth_of_one_class_per_image() -> None:
    truth = truth_of(torch.tensor([2, 0]), CONFIG)
    assert truth.tolist() == [[False, False, True], [True, False, False]]


def test_truth_of_labels() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    truth = truth_of(labels, replace(CONFIG, head="sigmoid"))
    assert truth.tolist() == [[True, False, True], [False, False, False]]
    with pytest.raises(DataError, match=r"several labels per image, .* head is softmax; expected"):
        truth_of(labels, CONFIG)


def test_decisions() -> None:
    probabilities = np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]])
    truth = np.array([[True, False, False], [False, True, False]])
    one = Predictions(CONFIG.classes, truth, probabilities)
    assert one.decided.tolist() == [[True, False, False], [True, False, False]]
    assert one.correct.tolist() == [True, False]
    assert one.confidence.tolist() == [0.7, 0.4]
    assert one.labels.tolist() == [0, 1]
    assert one.kind == "multi-class"
    several = replace(one, multi_label=True)
    assert several.decided.tolist() == [[True, False, False], [False, False, False]]
    assert several.outcome is several.truth
    assert several.kind == "multi-label"
    assert Predictions(("a", "b"), truth[:, :2], probabilities[:, :2]).kind == "binary"


def test_chunks_give_what_the_classifier_gives(random_checkpoint: Path) -> None:
    classifier = Classifier.load(random_checkpoint, device="cpu", max_batch=3)
    pixels = np.random.default_rng(0).integers(0, 255, (7, 64, 64, 3), np.uint8)
    found = predict(classifier, pixels)
    np.testing.assert_allclose(found, classifier.probabilities(pixels), atol=1e-6)
    assert found.dtype == np.float64


def test_probabilities_that_are_not_numbers(tmp_path: Path) -> None:
    weights = create_model("mambamic_t", 3).state_dict()
    weights["head.bias"].fill_(float("nan"))
    save_checkpoint(tmp_path / "model", replace(CONFIG, input_size=64), weights, "# None\n")
    classifier = Classifier.load(tmp_path / "model", device="cpu")
    with pytest.raises(DataError, match="no probabilities for 2 of 2 images"):
        predict(classifier, np.zeros((2, 64, 64, 3), np.uint8))
