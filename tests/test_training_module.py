"""The training step by itself: schedule, exemption from decay, and the average that is scored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from mambamic import create_model
from mambamic.training.augment import Augmentation
from mambamic.training.data import Batches, Split
from mambamic.training.module import TrainingModule, accuracy, criterion
from mambamic.training.recipe import Recipe
from mambamic.training.run import _quiet

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
    with _quiet():
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
    return TrainingModule(model, Augmentation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), recipe)


@pytest.fixture(scope="module")
def watched() -> tuple[TrainingModule, pl.Trainer, Watch]:
    module, watch = linear(), Watch()
    return module, fit(module, images(), watch), watch


def test_the_rate_rises_and_falls_along_a_cosine(
    watched: tuple[TrainingModule, pl.Trainer, Watch],
) -> None:
    rates = watched[2].rates
    rising = [0.1 * (step + 1) / 5 for step in range(1, 4)]
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
        if step:
            expected = 0.5 * expected + 0.5 * watch.weights[step]
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


def test_several_labels_are_scored_one_by_one() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 4.0, -0.5]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]])
    assert accuracy(logits, labels).item() == pytest.approx(4 / 6)
    probability = torch.sigmoid(logits)
    loss = -torch.where(labels > 0, probability, 1 - probability).log().mean()
    assert criterion(logits, labels).item() == pytest.approx(loss.item())
    right = torch.where(labels > 0, probability, 1 - probability).log()
    wrong = torch.where(labels > 0, 1 - probability, probability).log()
    smoothed = -(0.95 * right + 0.05 * wrong).mean()
    assert criterion(logits, labels, 0.1).item() == pytest.approx(smoothed.item())


def test_learns_several_labels() -> None:
    split = images(count=32)
    bright = 1 - split.labels
    several = Split(split.pixels, torch.stack([bright, split.labels], 1), split.classes)
    trainer = fit(linear(), several)
    assert trainer.callback_metrics["val_accuracy"] > 0.9
