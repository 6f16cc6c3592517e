"""Recipes in files: the shipped ones, what is put in their place, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mambamic.errors import UsageError
from mambamic.preprocess import Preprocess
from mambamic.training.recipe import Recipe, Strengths
from mambamic.training.recipe_files import read_recipe, shipped


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_default_says_what_the_code_says() -> None:
    assert read_recipe() == (Recipe(), Preprocess())


def test_the_published_setting() -> None:
    recipe, preprocess = read_recipe("published")
    assert (recipe.optimiser, recipe.learning_rate, recipe.weight_decay) == ("adam", 1e-4, 0)
    assert (recipe.epochs, recipe.batch_size, recipe.patience) == (200, 58, 30)
    assert (recipe.warmup_epochs, recipe.warmup_start, recipe.final_rate) == (10, 1e-3, 1e-6)
    assert recipe.clip_norm == recipe.ema_decay == recipe.label_smoothing == 0
    strengths = recipe.augmentation
    assert strengths.crop_area == (0.08, 1.0)
    assert strengths.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    others = (strengths.horizontal_flip, strengths.affine, strengths.colour, strengths.stain)
    assert others == (0, 0, 0, 0)
    assert (preprocess.input_size, preprocess.resize) == (224, "stretch")


def test_the_shipped_names() -> None:
    assert shipped() == ("microscopy", "published")


def test_a_file_of_ones_own_and_what_is_put_in_its_place(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "epochs = 9\nlearning_rate = 1\n"
        "[augmentation]\nstain = 0.2\nscale = [1, 2]\n[input]\ninput_size = 64\n",
    )
    strengths = Strengths(stain=0.2, scale=(1.0, 2.0))
    expected = Recipe(epochs=9, learning_rate=1.0, augmentation=strengths)
    assert read_recipe(path) == (expected, Preprocess(64))
    changes = {"epochs": 5, "scale": (1.0, 1.5), "input_size": 32}
    recipe, preprocess = read_recipe(path, changes)
    assert recipe.epochs == 5
    assert recipe.augmentation == Strengths(stain=0.2, scale=(1.0, 1.5))
    assert preprocess == Preprocess(32)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epoch = 9", "unknown key 'epoch'; expected one of epochs, "),
        ("augmentation.epochs = 9", "unknown key 'epochs'; expected one of crop_area, "),
        ("[inputs]\nx = 1", "unknown key 'inputs'"),
        ("epochs = 0", "epochs 0; expected at least 1"),
        ("epochs = 2.5", "epochs is 2.5; expected a whole number"),
        ("epochs = true", "epochs is True; expected a whole number"),
        ("learning_rate = 'fast'", "learning_rate is 'fast'; expected a number"),
        ("optimiser = 3", "optimiser is 3; expected text in quotes"),
        ("optimiser = 'sgd'", "optimiser sgd; expected one of adamw, adam"),
        ("augmentation = 3", "augmentation is 3; expected a table"),
        ("augmentation.scale = 1.0", "scale is 1.0; expected 2 numbers in brackets"),
        ("augmentation.scale = [1, 2, 3]", "scale is \\[1, 2, 3\\]; expected 2 numbers"),
        ("augmentation.stain = 1.0", "stain 1.0; expected from 0 to below 1"),
        ("input.resize = 'crop'", "resize 'crop'; expected one of"),
        ("epochs = ", "cannot be read .*; expected a recipe in TOML"),
    ],
)
def test_errors_name_the_file_and_the_key(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"mine\.toml:? {problem}"):
        read_recipe(written(tmp_path, text))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe 'paper'; expected one of microscopy, published"):
        read_recipe("paper")
    with pytest.raises(UsageError, match=r"missing\.toml"):
        read_recipe(tmp_path / "missing.toml")
