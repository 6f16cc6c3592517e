"""What augmentation draws at random, as numbers per image that any backend can apply."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambamic.training.recipe import Strengths

_TRIES = 10  # at a part of the image that lies within it
# What one unit of haematoxylin, eosin and DAB takes of red, green and blue, as optical densities
# (Ruifrok and Johnston 2001). Romanowsky stains have eosin and a blue dye as well; as a basis of
# the three densities it serves for any stain.
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_QUARTERS = torch.tensor(
    [[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]]
).float()


def draw_maps(
    batch: int, side: int, strengths: Strengths, generator: torch.Generator | None
) -> Tensor:
    """Draw, per image, the affine map from a place of the result to one of the image.

    Args:
        batch: Images.
        side: Of an image, in pixels.
        strengths: What may change, and how much.
        generator: Of random numbers on the CPU; None for torch's own.

    Returns:
        (B, 2, 3) float32, of (column, row) in pixels.
    """
    size, centre = _crops(batch, side, strengths, generator)
    drawn = torch.rand((batch, 9), generator=generator)
    flips = drawn[:, :2] < torch.tensor([strengths.horizontal_flip, strengths.vertical_flip])
    quarters = (drawn[:, 3] * 4).long().clamp(max=3) * (drawn[:, 2] < strengths.quarter_turns)
    moved = drawn[:, 4] < strengths.affine
    angle = math.radians(strengths.rotation) * (2 * drawn[:, 5] - 1) * moved
    low, high = strengths.scale
    zoom = torch.where(moved, low + (high - low) * drawn[:, 6], 1.0)
    shift = strengths.shift * side * (2 * drawn[:, 7:] - 1) * moved[:, None]
    cosine, sine = angle.cos(), angle.sin()
    turn = torch.stack([cosine, -sine, sine, cosine], 1).reshape(-1, 2, 2)
    factors = size * torch.where(flips, -1.0, 1.0) / zoom[:, None]
    linear = factors[:, :, None] * (_QUARTERS[quarters] @ turn)
    middle = torch.full((batch, 2), (side - 1) / 2)
    offset = middle + centre - (linear @ (middle + shift)[..., None])[..., 0]
    return torch.cat([linear, offset[..., None]], 2)


def _crops(
    batch: int, side: int, strengths: Strengths, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw parts of images in whole pixels: (B, 2) shares of the side, (B, 2) centres off ours."""
    if strengths.crop_area == (1.0, 1.0):
        return torch.ones(batch, 2), torch.zeros(batch, 2)
    tries = torch.rand((batch, _TRIES, 2), generator=generator)
    low, high = strengths.crop_area
    area = side * side * (low + (high - low) * tries[..., 0])
    narrow, wide = map(math.log, strengths.crop_ratio)
    ratio = (narrow + (wide - narrow) * tries[..., 1]).exp()
    sizes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], -1).round().clamp(min=1)
    fits = (sizes <= side).all(-1)
    first = fits.int().argmax(1)
    chosen = torch.where(fits.any(1)[:, None], sizes[torch.arange(batch), first], float(side))
    corner = (torch.rand((batch, 2), generator=generator) * (side - chosen + 1)).floor()
    return chosen / side, corner + (chosen - side) / 2


def draw_stains(batch: int, strength: float, generator: torch.Generator | None) -> Tensor:
    """Draw, per image, the affine map of optical densities that changes each stain's amount.

    Each stain is multiplied by a factor up to ``strength`` off 1, and up to ``strength`` is added
    to it (after Tellez and others, 2018).

    Returns:
        (B, 3, 4) float32, for red, green and blue.
    """
    change = strength * (2 * torch.rand((batch, 2, 3), generator=generator) - 1)
    factors, summands = 1 + change[:, 0], change[:, 1]
    unmix = torch.linalg.inv(_STAINS)
    linear = _STAINS.T @ (factors[:, :, None] * unmix.T)
    return torch.cat([linear, (summands @ _STAINS)[..., None]], 2)


def draw_shares(batch: int, most: float, generator: torch.Generator | None) -> Tensor:
    """Draw, per image, what of it is left when another is blended in (Zhang and others, 2018).

    Returns:
        (B,) float32, evenly between 1 - ``most`` and 1.
    """
    return 1 - most * torch.rand(batch, generator=generator)


def draw_colours(
    batch: int, strengths: Strengths, generator: torch.Generator | None
) -> tuple[Tensor, list[int]]:
    """Draw changes of colour.

    Returns:
        (B, 4) float32: the summand of the brightness, the factors of contrast and saturation, and
        the turn of the hue as a part of the circle; and the order in which they follow.
    """
    order = torch.randperm(4, generator=generator).tolist()
    drawn = torch.rand((batch, 5), generator=generator)
    most = (strengths.brightness, strengths.contrast, strengths.saturation, strengths.hue)
    changed = (drawn[:, :1] < strengths.colour) * torch.tensor(most) * (2 * drawn[:, 1:] - 1)
    return changed + torch.tensor([0.0, 1.0, 1.0, 0.0]), order
