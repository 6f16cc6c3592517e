"""Augmentation: exact normalisation in evaluation, variety and the right range in training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mambamic.preprocess import Preprocess, Triple
from mambamic.training.augment import Augmentation, change_stain, warp
from mambamic.training.recipe import Strengths
from mambamic.training.recipe_files import read_recipe
from mambamic.training.share import Share

from . import gpu_waits

MEAN: Triple = (0.485, 0.456, 0.406)
STD: Triple = (0.229, 0.224, 0.225)
NONE = Strengths(horizontal_flip=0, vertical_flip=0, quarter_turns=0, affine=0, colour=0, stain=0)


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


def smooth(count: int, side: int, seed: int = 0) -> Tensor:
    """(N, S, S, 3) uint8, without detail that a place a little off would miss."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 12, 12), generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (images * 255).permute(0, 2, 3, 1).to(torch.uint8)


def test_nothing_changes_where_all_strengths_are_zero(pixels: Tensor) -> None:
    augmentation = Augmentation(MEAN, STD, NONE)
    expected = augmentation.eval()(pixels)
    torch.testing.assert_close(augmentation.train()(pixels), expected, rtol=0, atol=1e-4)


def test_places_outside_are_reflected_at_the_edges() -> None:
    image = torch.arange(4.0).expand(1, 1, 4, 4)
    two_to_the_right = torch.tensor([[[1.0, 0, 2], [0, 1, 0]]])
    assert warp(image, two_to_the_right)[0, 0, 0].tolist() == pytest.approx([2, 3, 3, 2])


def test_stain_is_changed_as_an_amount() -> None:
    """Twice as much of each stain takes the light away twice: values are squared."""
    images = torch.rand((2, 3, 5, 5), generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    twice = torch.cat([2 * torch.eye(3), torch.zeros(3, 1)], 1).expand(2, 3, 4)
    torch.testing.assert_close(change_stain(images, twice), images**2)
    more = torch.cat([torch.eye(3), torch.full((3, 1), 0.5)], 1).expand(2, 3, 4)
    torch.testing.assert_close(change_stain(images, more), images * math.exp(-0.5))


def test_shares_are_parts_of_what_one_process_makes(pixels: Tensor) -> None:
    def made(part: Tensor, share: Share) -> Tensor:
        augmentation = Augmentation(MEAN, STD, share=share).train()
        augmentation.seed(5)
        torch.manual_seed(share.rank)  # what else is random does not matter
        images: Tensor = augmentation(part)
        return images

    parts = [made(Share(rank, 2).of(pixels), Share(rank, 2)) for rank in range(2)]
    # How torch rounds depends on a batch's size, on some processors.
    torch.testing.assert_close(torch.cat(parts), made(pixels, Share()), atol=1e-4, rtol=0)


RECIPES = {
    "microscopy": Strengths(),
    "published": read_recipe("published")[0].augmentation,
    "quarter turns": replace(NONE, quarter_turns=1.0, horizontal_flip=0.5),
    "strong stain": replace(Strengths(), stain=0.4),
    "all at once": replace(Strengths(), crop_area=(0.3, 1.0), stain=0.1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", range(4))  # each with another order of the changes of colour
def test_the_kernel_does_what_torch_and_kornia_do(name: str, seed: int) -> None:
    pixels = smooth(16, 96, seed)
    torch.manual_seed(seed)
    expected = Augmentation(MEAN, STD, RECIPES[name]).train()(pixels)
    torch.manual_seed(seed)
    got = Augmentation(MEAN, STD, RECIPES[name]).cuda().train()(pixels.cuda())
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-3)


@pytest.mark.gpu
def test_quarter_turns_blur_nothing_in_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 33, 33, 3), dtype=torch.uint8, generator=generator)
    turned = (
        Augmentation((0,) * 3, (1,) * 3, RECIPES["quarter turns"]).cuda().train()(pixels.cuda())
    )
    values = (turned * 255).cpu()
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-3)
    same = [sorted(a.flatten().tolist()) for a in (values.round().byte(), pixels)]
    assert same[0] == same[1]


@pytest.mark.gpu
def test_stain_costs_no_wait_for_the_gpu() -> None:
    augmentation = Augmentation(MEAN, STD).cuda().train()
    pixels = smooth(8, 64).cuda()
    augmentation(pixels)
    with gpu_waits.refused():
        augmentation(pixels)
