"""The settings of a training run: what is refused, and that the demo's are the defaults."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mambamic.errors import UsageError
from mambamic.training.recipe import Recipe, Strengths, epoch_seed


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("warmup_epochs", -1),
        ("warmup_epochs", 64),
        ("early_share", 1.1),
        ("early_side", 0.0),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("clip_norm", -1.0),
        ("clip_norm", math.inf),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("seed", -1),
        ("seed", 2**32),
        ("optimiser", "sgd"),
        ("schedule", "step"),
        ("class_weighting", "inverse"),
        ("patience", -1),
        ("warmup_start", 1.5),
        ("final_rate", -0.1),
    ],
)
def test_what_cannot_work_is_refused_by_name(setting: str, value: object) -> None:
    wrong: dict[str, Any] = {setting: value}
    with pytest.raises(UsageError, match=f"^{setting} {value}; expected "):
        Recipe(**wrong)


def test_the_least_and_the_most_are_taken() -> None:
    Recipe(epochs=1, warmup_epochs=0, batch_size=2, weight_decay=0, ema_decay=0, seed=2**32 - 1)
    Recipe(epochs=5, warmup_epochs=4, label_smoothing=0)


@pytest.mark.parametrize(
    ("strength", "value"),
    [
        ("crop_area", (0.0, 1.0)),
        ("crop_area", (0.5, 1.1)),
        ("scale", (1.2, 0.8)),
        ("horizontal_flip", 1.1),
        ("quarter_turns", math.nan),
        ("rotation", 181.0),
        ("stain", 1.0),
        ("hue", 0.6),
    ],
)
def test_strengths_that_make_no_sense(strength: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{strength} .*; expected "):
        Strengths(**{strength: value})


def test_as_dict_says_everything() -> None:
    recipe = Recipe(epochs=7, seed=3, augmentation=Strengths(stain=0.2))
    stated = recipe.as_dict()
    assert Recipe(**{**stated, "augmentation": Strengths(**stated["augmentation"])}) == recipe
    json.dumps(stated)


def test_each_pass_has_a_seed_of_its_own() -> None:
    seeds = {epoch_seed(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(seeds) == 2500
