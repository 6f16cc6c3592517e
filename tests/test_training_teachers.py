"""Learning from trained networks: what they say, what it does to the loss, whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mambamic.checkpoint import Checkpoint, load_checkpoint
from mambamic.cli import main
from mambamic.errors import UsageError
from mambamic.models import create_model
from mambamic.training.augment import Augmentation
from mambamic.training.loss import distillation
from mambamic.training.module import TrainingModule
from mambamic.training.recipe import Recipe, Strengths
from mambamic.training.run import train
from mambamic.training.teachers import Teachers

from .random_checkpoint import write_random_checkpoint
from .training_runs import RECIPE, SIZE, command, one_torch_thread, run_in, write_two_colours

CLASSES = ("blood", "stain")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """Of two architectures, which know the same classes in another order."""
    folder = tmp_path_factory.mktemp("teachers")
    return (
        load_checkpoint(write_random_checkpoint(folder / "first", classes=CLASSES)),
        load_checkpoint(
            write_random_checkpoint(
                folder / "second", architecture="medmamba_t", classes=CLASSES[::-1], input_size=SIZE
            )
        ),
    )


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(
        0, 256, (3, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0)
    ).byte()


def chances(checkpoint: Checkpoint, pixels: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """What the plain module makes of images."""
    model = create_model(checkpoint.config.architecture, len(order))
    model.load_state_dict(checkpoint.state_dict())
    with torch.no_grad():
        logits = model.eval()(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    found: torch.Tensor = logits.softmax(1)[:, order]
    return found


def test_they_say_together_what_each_says(
    checkpoints: tuple[Checkpoint, Checkpoint], pixels: torch.Tensor
) -> None:
    teachers = Teachers(checkpoints, CLASSES, "softmax", "cpu")
    first, second = (
        chances(checkpoint, pixels, order)
        for checkpoint, order in zip(checkpoints, ((0, 1), (1, 0)), strict=True)
    )
    assert (first - second).abs().max() > 1e-3
    expected = (first + second) / 2
    torch.testing.assert_close(teachers(pixels), expected, rtol=0, atol=1e-5)
    labels = expected.argmax(1)
    assert teachers.accuracy(pixels, labels, batch=2) == 1
    assert teachers.accuracy(pixels, 1 - labels, batch=2) == 0


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_least_where_the_teachers_are_followed(several: bool) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 4.0, -0.5]])
    taught = logits.sigmoid() if several else logits.softmax(1)
    followed = distillation(logits, taught, several=several)
    if several:
        spread = -(taught * taught.log() + (1 - taught) * (1 - taught).log()).mean()
    else:
        spread = -(taught * taught.log()).sum(1).mean()
    torch.testing.assert_close(followed, spread)
    assert distillation(logits + torch.tensor([0.1, 0, 0]), taught, several=several) > followed


def test_a_step_follows_labels_and_teachers(
    checkpoints: tuple[Checkpoint, Checkpoint], pixels: torch.Tensor
) -> None:
    """They see the blended images that the learner sees, to within the rounding of a pixel."""
    teachers = Teachers(checkpoints[:1], CLASSES, "softmax", "cpu")
    labels = torch.tensor([0, 1, 0])
    torch.manual_seed(0)
    model = create_model("mambamic_t", 2).eval()  # nothing at random

    def loss(share: float) -> float:
        augmentation = Augmentation((0.5,) * 3, (0.5,) * 3, Strengths(mixup=0.5))
        augmentation.seed(1)
        recipe = Recipe(distillation=share, early_share=0.0)
        module = TrainingModule(model, augmentation, recipe, teachers=teachers)
        return module.loss(pixels, labels).item()

    augmentation = Augmentation((0.5,) * 3, (0.5,) * 3, Strengths(mixup=0.5))
    augmentation.seed(1)
    images, _ = augmentation.blend(augmentation(pixels))
    seen = augmentation.pixels(images)
    assert (seen.permute(0, 3, 1, 2) / 127.5 - 1 - images).abs().max() <= 0.5 / 127.5 + 1e-6
    followed = F.cross_entropy(model(images), chances(checkpoints[0], seen, (0, 1)))
    assert loss(1.0) == pytest.approx(followed.item(), abs=1e-5)
    assert loss(0.25) == pytest.approx(0.75 * loss(0.0) + 0.25 * loss(1.0), abs=1e-5)


def test_a_run_says_who_taught(
    checkpoints: tuple[Checkpoint, Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_two_colours(tmp_path / "data"), tmp_path / "out"
    call = [argument for argument in command(data, out) if argument != "--quiet"]
    paths = [str(checkpoint.path) for checkpoint in checkpoints]
    assert main([*call, "--epochs", "2", "--teachers", *paths]) == 0
    assert "teachers: validation accuracy 0." in capsys.readouterr().err
    hashes = [checkpoint.config.weights_sha256 for checkpoint in checkpoints]
    assert json.loads((out / "run.json").read_text())["teachers"] == hashes
    card = load_checkpoint(out / "checkpoint").card()
    assert f"Learned from: the labels, mambamic_t {hashes[0]}, medmamba_t {hashes[1]}\n" in card
    recipe = replace(RECIPE, epochs=2)
    with pytest.raises(UsageError, match=r"holds a run with teachers \['.*'\] and not \[\]"):
        train(run_in(data, out, recipe=recipe), device="cpu", progress=False)


def test_teachers_of_something_else(
    checkpoints: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    path = write_random_checkpoint(tmp_path / "teacher", classes=("blood", "bone"))
    data = write_two_colours(tmp_path / "data")
    told = r"teacher tells blood, bone \(softmax\) apart; expected a teacher of blood, stain \(s"
    with pytest.raises(UsageError, match=told):
        train(run_in(data, tmp_path / "out", teachers=(path,)), device="cpu", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"blood, stain \(softmax\) apart; .* \(sigmoid\)"):
        Teachers(checkpoints, CLASSES, "sigmoid", "cpu")


@pytest.mark.gpu
def test_on_a_gpu_they_say_the_same(checkpoints: tuple[Checkpoint, Checkpoint]) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 160, 160, 3), generator=generator).byte()
    there = Teachers(checkpoints, CLASSES, "softmax", "cuda:0")
    here = Teachers(checkpoints, CLASSES, "softmax", "cpu")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = there(pixels.cuda()).cpu()
    torch.testing.assert_close(found, here(pixels), rtol=0, atol=5e-3)
