"""What augmentation draws: exact turns, crops within the image, ranges, and the seed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mambamic.training.augment import warp
from mambamic.training.draws import draw_colours, draw_maps, draw_shares, draw_stains
from mambamic.training.recipe import Strengths

SIDE = 33
STILL = Strengths(horizontal_flip=0, vertical_flip=0, quarter_turns=0, affine=0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_no_change_is_the_identity(generator: torch.Generator) -> None:
    maps = draw_maps(5, SIDE, STILL, generator)
    assert torch.equal(maps, torch.eye(2, 3).expand(5, 2, 3))


def test_quarter_turns_and_flips_are_exact(generator: torch.Generator) -> None:
    """All eight ways to lay an image, and nothing else."""
    strengths = Strengths(affine=0)
    images = torch.rand((64, 1, SIDE, SIDE), generator=generator)
    maps = draw_maps(64, SIDE, strengths, generator)
    assert torch.equal(maps, maps.round())
    seen = set()
    for image, found in zip(images, warp(images, maps), strict=True):
        ways = [
            torch.rot90(side, turns, (1, 2))
            for side in (image, image.flip(2))
            for turns in range(4)
        ]
        right = [i for i, way in enumerate(ways) if torch.allclose(way, found, atol=1e-4)]
        assert len(right) == 1
        seen.update(right)
    assert seen == set(range(8))


@pytest.mark.parametrize(("name", "axis"), [("horizontal_flip", 2), ("vertical_flip", 1)])
def test_flips_are_what_they_say(name: str, axis: int, generator: torch.Generator) -> None:
    flips: dict[str, Any] = {"horizontal_flip": 0.0, "vertical_flip": 0.0, name: 1.0}
    images = torch.rand((1, 1, SIDE, SIDE), generator=generator)
    maps = draw_maps(1, SIDE, Strengths(**flips, quarter_turns=0, affine=0), generator)
    torch.testing.assert_close(warp(images, maps)[0], images[0].flip(axis), rtol=0, atol=1e-4)


def corners(maps: Tensor) -> Tensor:
    """Where the outer corners of the result lie in the image, in pixels from its left top edge."""
    ends = torch.tensor([[x, y, 1.0] for x in (-0.5, SIDE - 0.5) for y in (-0.5, SIDE - 0.5)])
    return (maps @ ends.T).transpose(1, 2) + 0.5


def test_crops_lie_within_the_image_and_have_the_asked_sizes(generator: torch.Generator) -> None:
    strengths = Strengths(
        crop_area=(0.2, 0.9), horizontal_flip=0, vertical_flip=0, quarter_turns=0, affine=0
    )
    found = corners(draw_maps(2000, SIDE, strengths, generator))
    assert found.min() >= -1e-3
    assert found.max() <= SIDE + 1e-3
    size = found.amax(1) - found.amin(1)
    torch.testing.assert_close(size, size.round(), rtol=0, atol=1e-3)
    area, ratio = size.prod(1) / SIDE**2, size[:, 0] / size[:, 1]
    # Sizes are whole pixels: up to half a pixel off.
    assert 0.17 < area.min() < 0.25
    assert 0.85 < area.max() < 0.95
    assert 0.68 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.47
    assert found.amin(1).unique(dim=0).shape[0] > 100, "they all lie at one place"


def test_rotation_scale_and_shift_keep_to_their_ranges(generator: torch.Generator) -> None:
    strengths = Strengths(
        horizontal_flip=0, vertical_flip=0, quarter_turns=0,
        affine=1, rotation=30, scale=(0.8, 1.2), shift=0.1,
    )  # fmt: skip
    maps = draw_maps(2000, SIDE, strengths, generator)
    zoom = 1 / torch.linalg.det(maps[..., :2]).sqrt()
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0]).rad2deg()
    assert 0.8 <= zoom.min() < 0.82
    assert 1.18 < zoom.max() <= 1.2001
    assert 29 < angle.abs().max() <= 30.001
    middle = torch.full((2,), (SIDE - 1) / 2)
    moved = (maps[..., :2] @ middle + maps[..., 2] - middle) * zoom[:, None]
    assert 0.09 * SIDE < moved.norm(dim=1).max() <= 0.1 * SIDE * math.sqrt(2) + 1e-3


def test_a_part_of_the_images_is_left_sharp(generator: torch.Generator) -> None:
    maps = draw_maps(2000, SIDE, Strengths(affine=0.8), generator)
    sharp = (maps == maps.round()).all(-1).all(-1).float().mean()
    assert sharp.item() == pytest.approx(0.2, abs=0.04)


def test_what_is_left_of_an_image_is_drawn_evenly(generator: torch.Generator) -> None:
    shares = draw_shares(2000, 0.4, generator)
    assert 0.6 < shares.min() < 0.61
    assert 0.99 < shares.max() <= 1
    assert shares.mean().item() == pytest.approx(0.8, abs=0.01)


def test_stains_change_by_the_strength(generator: torch.Generator) -> None:
    maps = draw_stains(1000, 0.1, generator)
    factors = torch.linalg.eigvals(maps[..., :3])
    assert factors.imag.abs().max() < 1e-4
    assert 0.9 - 1e-4 <= factors.real.min() < 0.905
    assert 1.095 < factors.real.max() <= 1.1 + 1e-4
    assert maps[..., 3].abs().max() > 0.05
    identity = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1).expand(4, 3, 4)
    torch.testing.assert_close(draw_stains(4, 0.0, generator), identity, rtol=0, atol=1e-5)


def test_colours_keep_to_their_ranges(generator: torch.Generator) -> None:
    strengths = Strengths(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.04)
    factors, order = draw_colours(2000, strengths, generator)
    neutral = torch.tensor([0.0, 1.0, 1.0, 0.0])
    most = torch.tensor([0.1, 0.2, 0.3, 0.04])
    off = (factors - neutral).abs().amax(0)
    assert (off <= most + 1e-6).all()
    assert (off > 0.95 * most).all()
    unchanged = (factors == neutral).all(1).float().mean()
    assert unchanged.item() == pytest.approx(0.2, abs=0.04)
    assert sorted(order) == [0, 1, 2, 3]


def test_the_seed_decides() -> None:
    drawn = [draw_maps(4, SIDE, Strengths(), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
