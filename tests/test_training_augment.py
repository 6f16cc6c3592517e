"""Augmentation: exact normalisation in evaluation, variety and the right range in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambamic.preprocess import Preprocess, Triple
from mambamic.training.augment import Augmentation

MEAN: Triple = (0.485, 0.456, 0.406)
STD: Triple = (0.229, 0.224, 0.225)


@pytest.fixture
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=generator)


def test_evaluation_is_what_the_classifier_does(pixels: Tensor) -> None:
    found = Augmentation(MEAN, STD).eval()(pixels)
    expected = torch.from_numpy(Preprocess(32, mean=MEAN, std=STD).normalise(pixels.numpy()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_evaluation_is_always_the_same(pixels: Tensor) -> None:
    augmentation = Augmentation(MEAN, STD).eval()
    assert torch.equal(augmentation(pixels), augmentation(pixels))


def test_training_keeps_shape_and_range(pixels: Tensor) -> None:
    torch.manual_seed(0)
    found = Augmentation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).train()(pixels)
    assert found.shape == (6, 3, 32, 32)
    assert found.dtype == torch.float32
    assert found.min() >= -1
    assert found.max() <= 1


def test_training_differs_between_calls_and_between_images(pixels: Tensor) -> None:
    torch.manual_seed(0)
    augmentation = Augmentation(MEAN, STD).train()
    same = pixels[:1].expand(6, -1, -1, -1)
    first, second = augmentation(same), augmentation(same)
    assert not torch.equal(first, second)
    assert all(not torch.equal(first[0], other) for other in first[1:])


def test_training_depends_on_the_seed_alone(pixels: Tensor) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(Augmentation(MEAN, STD).train()(pixels))
    assert torch.equal(results[0], results[1])


def test_a_stain_keeps_its_colour() -> None:
    """Classes that differ in colour must still differ: red stays redder than blue."""
    torch.manual_seed(0)
    red = torch.tensor([200, 60, 60], dtype=torch.uint8).expand(64, 16, 16, 3)
    images = Augmentation((0, 0, 0), (1, 1, 1)).train()(red)
    assert (images[:, 0] > images[:, 2] + 0.15).all()
    assert images.mean((1, 2, 3)).std() > 0.01, "the brightness never changes"


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))  # each with another order of the changes of colour
def test_the_kernel_does_what_kornia_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((16, 3, 12, 12), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bilinear")
    pixels = (smooth * 255).permute(0, 2, 3, 1).to(torch.uint8)
    torch.manual_seed(seed)
    expected = Augmentation(MEAN, STD).train()(pixels)
    torch.manual_seed(seed)
    got = Augmentation(MEAN, STD).cuda().train()(pixels.cuda())
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-3)
