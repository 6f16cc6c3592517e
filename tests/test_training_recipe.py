"""The settings of a training run: what is refused, and that the demo's are the defaults."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mambamic.errors import UsageError
from mambamic.training.recipe import Recipe, epoch_seed


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("warmup_epochs", -1),
        ("warmup_epochs", 42),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("clip_norm", 0.0),
        ("clip_norm", math.inf),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_what_cannot_work_is_refused_by_name(setting: str, value: float) -> None:
    wrong: dict[str, Any] = {setting: value}
    with pytest.raises(UsageError, match=f"^{setting} {value}; expected "):
        Recipe(**wrong)


def test_the_least_and_the_most_are_taken() -> None:
    Recipe(epochs=1, warmup_epochs=0, batch_size=2, weight_decay=0, ema_decay=0, seed=2**32 - 1)
    Recipe(epochs=5, warmup_epochs=4, label_smoothing=0)


def test_as_dict_says_everything() -> None:
    recipe = Recipe(epochs=7, seed=3)
    assert Recipe(**json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_each_pass_has_a_seed_of_its_own() -> None:
    seeds = {epoch_seed(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(seeds) == 2500
