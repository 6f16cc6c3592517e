"""Temperatures: one that is known is found again, stored, and used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mambamic import Classifier
from mambamic.checkpoint import CONFIG_FILE, load_checkpoint
from mambamic.errors import CheckpointError, DataError
from mambamic.evaluation.calibration import fit_temperature, store_temperature, tempered
from mambamic.evaluation.metrics import measure, nll_of_each
from mambamic.evaluation.predictions import Predictions

from .random_predictions import softmax


def overconfident(temperature: float, *, multi_label: bool, images: int = 20_000) -> Predictions:
    """Predictions whose logits are ``temperature`` times too large."""
    generator = np.random.default_rng(7)
    logits = generator.normal(size=(images, 4)) * 2
    names = tuple("abcd")
    if multi_label:
        truth = generator.random(logits.shape) < 1 / (1 + np.exp(-logits))
        probabilities = 1 / (1 + np.exp(-logits * temperature))
    else:
        truth = (logits + generator.gumbel(size=logits.shape)).argmax(1)[:, None] == np.arange(4)
        probabilities = softmax(logits * temperature)
    return Predictions(names, truth, probabilities.astype(np.float32).astype(float), multi_label)


@pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature: float, multi_label: bool) -> None:
    predictions = overconfident(temperature, multi_label=multi_label)
    found = fit_temperature(predictions)
    assert found == pytest.approx(temperature, rel=0.03)
    assert found == fit_temperature(predictions)
    after = tempered(predictions, found)
    assert float(measure(after).overall["calibration_error"]) < 0.015
    if temperature != 1:
        assert nll_of_each(after).mean() < nll_of_each(predictions).mean()


@pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoid"])
def test_the_temperature_has_the_lowest_likelihood(multi_label: bool) -> None:
    predictions = overconfident(1.7, multi_label=multi_label, images=500)
    found = fit_temperature(predictions)

    def nll(temperature: float) -> float:
        return float(nll_of_each(tempered(predictions, temperature)).mean())

    assert nll(found) < min(nll(found * 0.99), nll(found * 1.01))


@pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoid"])
def test_tempered_is_what_torch_gives(multi_label: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator) * 3
    truth = np.zeros((200, 4), bool)
    activation = torch.sigmoid if multi_label else lambda values: values.softmax(1)
    plain = Predictions(tuple("abcd"), truth, activation(logits).double().numpy(), multi_label)
    found = tempered(plain, 0.6).probabilities
    np.testing.assert_allclose(found, activation(logits / 0.6).numpy(), atol=1e-6)


def test_certain_probabilities_stay_finite() -> None:
    certain = np.array([[1.0, 0.0], [0.0, 1.0]])
    for multi_label in (False, True):
        predictions = Predictions(("a", "b"), certain == 1, certain, multi_label)
        for temperature in (0.02, 50.0):
            assert np.isfinite(tempered(predictions, temperature).probabilities).all()


def test_without_mistakes_there_is_no_temperature() -> None:
    truth = np.eye(2, dtype=bool)[[0, 1, 0, 1]]
    predictions = Predictions(("a", "b"), truth, np.where(truth, 0.8, 0.2))
    with pytest.raises(DataError, match="no temperature fits 4 validation images with 0 mistakes"):
        fit_temperature(predictions)


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))


def test_the_classifier_uses_what_was_stored(checkpoint: Path) -> None:
    opened = load_checkpoint(checkpoint)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    mode = (checkpoint / CONFIG_FILE).stat().st_mode
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    before = Classifier.load(checkpoint, device="cpu").probabilities(pixels)

    stored = store_temperature(opened, 2.5)
    assert stored.config == replace(opened.config, temperature=2.5)
    assert load_checkpoint(checkpoint) == stored
    assert json.loads((checkpoint / CONFIG_FILE).read_text())["temperature"] == 2.5
    assert (checkpoint / CONFIG_FILE).stat().st_mode == mode
    after_files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert after_files.keys() == files.keys()
    assert [name for name in files if files[name] != after_files[name]] == [CONFIG_FILE]

    after = Classifier.load(checkpoint, device="cpu").probabilities(pixels)
    plain = Predictions(opened.config.classes, np.zeros(before.shape, bool), before.astype(float))
    np.testing.assert_allclose(after, tempered(plain, 2.5).probabilities, atol=1e-5)
    assert np.abs(after - before).max() > 0.01


def test_a_checkpoint_that_is_gone(checkpoint: Path) -> None:
    opened = load_checkpoint(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be written"):
        store_temperature(opened, 2.0)
