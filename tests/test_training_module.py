"""The training step by itself: schedule, exemption from decay, and the average that is scored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from mambamic import create_model
from mambamic.errors import TrainingError
from mambamic.training.augment import Augmentation, shrink
from mambamic.training.data import Batches, Split
from mambamic.training.fit import quiet
from mambamic.training.loss import criterion
from mambamic.training.module import TrainingModule
from mambamic.training.recipe import Recipe

RECIPE = Recipe(epochs=4, warmup_epochs=1, batch_size=4, learning_rate=0.1, ema_decay=0.5)
STEPS = 16


class Watch(pl.Callback):
    """Note what each step did."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[Tensor] = []
        self.averages: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: object
    ) -> None:
        assert isinstance(module, TrainingModule)
        # The scheduler has moved on: this is the rate of the next step.
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.weights.append(module.model.get_parameter("1.weight").detach().clone())
        self.averages.append(module.average.get_parameter("module.1.weight").detach().clone())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small operations: where cores are shared, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(size: int = 4, count: int = 16) -> Split:
    """Bright and dark images in turn."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    pixels[1::2] //= 4
    return Split(pixels, torch.arange(count) % 2, ("bright", "dark"))


def fit(module: TrainingModule, split: Split, *callbacks: pl.Callback) -> pl.Trainer:
    recipe = module.recipe
    with quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=recipe.epochs,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        batches = Batches(split, recipe.batch_size, recipe.seed)
        trainer.fit(module, batches, Batches(split, 16, None))
    return trainer


def linear(recipe: Recipe = RECIPE) -> TrainingModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    augmentation = Augmentation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), recipe.augmentation)
    return TrainingModule(model, augmentation, recipe)


@pytest.fixture(scope="module")
def watched() -> tuple[TrainingModule, pl.Trainer, Watch]:
    module, watch = linear(), Watch()
    return module, fit(module, images(), watch), watch


def test_the_rate_rises_and_falls_along_a_cosine(
    watched: tuple[TrainingModule, pl.Trainer, Watch],
) -> None:
    rates = watched[2].rates
    rising = [0.1 * (0.001 + 0.999 * step / 4) for step in range(1, 4)]
    falling = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(13)]
    assert len(rates) == STEPS
    assert rates == pytest.approx([*rising, *falling], abs=1e-9)


def test_the_average_follows_the_weights(
    watched: tuple[TrainingModule, pl.Trainer, Watch],
) -> None:
    module, _, watch = watched
    final = module.average.get_parameter("module.1.weight").detach()
    expected = watch.weights[0]
    # A callback is called before the module itself: each average is that of the step before.
    for step, average in enumerate([*watch.averages[1:], final]):
        decay = min(0.5, step / (10 + step))  # 16 steps: it rises, and then it stays
        expected = decay * expected + (1 - decay) * watch.weights[step]
        torch.testing.assert_close(average, expected)
    assert not torch.equal(final, watch.weights[-1])


def test_it_is_the_average_that_is_scored(
    watched: tuple[TrainingModule, pl.Trainer, Watch],
) -> None:
    module, trainer, _ = watched
    split = images()
    with torch.inference_mode():
        logits = module.eval().average(module.augmentation(split.pixels))
    right = (logits.argmax(1) == split.labels).float().mean()
    assert trainer.callback_metrics["val_accuracy"] == pytest.approx(float(right))
    assert right > 0.7  # and it has learnt something
    expected = nn.functional.cross_entropy(logits, split.labels)
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], expected)


def test_the_same_seed_gives_the_same_weights(
    watched: tuple[TrainingModule, pl.Trainer, Watch],
) -> None:
    again = linear()
    torch.manual_seed(77)  # each pass sets its own
    fit(again, images())
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, watched[0].state_dict()[key]), key


def test_what_is_exempt_from_weight_decay() -> None:
    model = create_model("mambamic_t", 2)
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=16)
    module = TrainingModule(model, Augmentation((0.5,) * 3, (0.5,) * 3), recipe)
    decayed, plain = fit(module, images(32, 4)).optimizers[0].param_groups
    exempt = {id(parameter) for parameter in plain["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(decayed["params"]) + len(plain["params"])
    for name, parameter in parameters.items():
        special = name.endswith(("bias", "A_logs", "Ds")) or parameter.ndim == 1
        assert (id(parameter) in exempt) == special, name


@pytest.mark.parametrize(
    ("changes", "last"),
    [({"final_rate": 0.01}, 1e-3), ({"schedule": "constant", "optimiser": "adam"}, 0.1)],
)
def test_the_rate_ends_where_the_recipe_says(changes: dict[str, Any], last: float) -> None:
    watch = Watch()
    trainer = fit(linear(replace(RECIPE, warmup_start=0.5, **changes)), images(), watch)
    assert watch.rates[:3] == pytest.approx([0.05 + 0.05 * step / 4 for step in (1, 2, 3)])
    assert watch.rates[3] == pytest.approx(0.1)
    assert watch.rates[-1] == pytest.approx(last)
    kind = torch.optim.Adam if "optimiser" in changes else torch.optim.AdamW
    assert type(trainer.optimizers[0]) is kind


def test_classes_are_weighed() -> None:
    recipe = replace(RECIPE, augmentation=replace(RECIPE.augmentation, mixup=0.0))
    module = linear(recipe)
    split, weights = images(), torch.tensor([1.0, 5.0])
    weighted = TrainingModule(module.model, module.augmentation.eval(), recipe, weights)
    logits = module.model(module.augmentation(split.pixels))
    expected = criterion(logits, split.labels, recipe.label_smoothing, weights)
    torch.testing.assert_close(weighted.loss(split.pixels, split.labels), expected)


def test_no_average_is_the_weights_themselves() -> None:
    module = linear(replace(RECIPE, ema_decay=0.0))
    fit(module, images())
    average = module.average.get_parameter("module.1.weight")
    assert torch.equal(average, module.model.get_parameter("1.weight"))


class Break(pl.Callback):
    """Spoil a weight once, as a step that diverges does."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, _batch: object, index: int
    ) -> None:
        if (trainer.current_epoch, index) == (2, 1):
            with torch.no_grad():
                module.get_parameter("model.1.weight")[0, 0] = torch.nan


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_loss_that_is_no_number_ends_the_run_by_name(clip_norm: float) -> None:
    with pytest.raises(TrainingError, match=r"since step 2 of epoch 3 .*smaller --learning-rate"):
        fit(linear(replace(RECIPE, clip_norm=clip_norm)), images(), Break())


def test_numbers_are_looked_at_without_waiting_for_them() -> None:
    """A step adds to a tensor on the device, and nothing is read from it but now and then."""
    module = linear()
    module.note(torch.tensor(1.0))
    assert int(module.failed_at) == torch.iinfo(torch.int64).max
    module.note(torch.tensor(torch.inf))
    assert int(module.failed_at) == 0
    assert "failed_at" not in module.state_dict()


def test_learns_several_labels() -> None:
    split = images(count=32)
    bright = 1 - split.labels
    several = Split(split.pixels, torch.stack([bright, split.labels], 1), split.classes)
    trainer = fit(linear(), several)
    assert trainer.callback_metrics["val_accuracy"] > 0.9


def test_blended_images_have_the_labels_of_both() -> None:
    """Half of another image and half of its label: the loss of both, weighed alike."""
    module = linear(replace(RECIPE, augmentation=replace(RECIPE.augmentation, mixup=0.5)))
    split = images(count=4)
    module.augmentation.seed(5)
    blended = module.loss(split.pixels, split.labels)
    module.augmentation.seed(5)
    plain = module.augmentation(split.pixels)
    blends, shares = module.augmentation.blend(plain)
    assert ((shares > 0.5) & (shares < 1)).all()
    for index, share in enumerate(shares):
        expected = share * plain[index] + (1 - share) * plain[index ^ 1]
        torch.testing.assert_close(blends[index], expected)
    each = torch.nn.functional.cross_entropy
    smoothing, logits = RECIPE.label_smoothing, module.model(blends)
    own = each(logits, split.labels, reduction="none", label_smoothing=smoothing)
    others = each(logits, split.labels[[1, 0, 3, 2]], reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(blended, (shares * own + (1 - shares) * others).mean())


def test_the_first_epochs_see_smaller_images() -> None:
    """Half of four epochs at half of 64 pixels; what chooses the epoch is seen as it is."""
    recipe = replace(RECIPE, early_share=0.5, early_side=0.5)
    sides: list[tuple[bool, int]] = []

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            sides.append((self.training, images.shape[-1]))
            logits: Tensor = self.linear(images.mean((2, 3)))
            return logits

    module = TrainingModule(Mean(), Augmentation((0.5,) * 3, (0.5,) * 3), recipe)
    fit(module, images(64))
    assert [side for training, side in sides if training] == [32] * 8 + [64] * 8
    assert {side for training, side in sides if not training} == {64}


def test_smaller_images_are_what_reading_them_smaller_gives() -> None:
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64)).rotate(30)
    pixels = torch.from_numpy(np.array(image))[None]
    expected = np.array(image.resize((32, 32), Image.Resampling.BILINEAR))
    difference = shrink(pixels, 32)[0].int() - torch.from_numpy(expected).int()
    assert difference.abs().max() <= 1
