"""Augmentation on the device, in the ways in which microscopy images really differ."""

from __future__ import annotations

import math

import torch
from kornia.enhance import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from torch import Tensor, nn
from torch.nn import functional as F

from mambamic.kernels import nvrtc
from mambamic.kernels.augment import augment
from mambamic.preprocess import Triple
from mambamic.training.draws import draw_colours, draw_maps, draw_shares, draw_stains
from mambamic.training.recipe import Strengths
from mambamic.training.share import Share

_LEAST = 1 / 255  # below it an optical density would have no end


class Augmentation(nn.Module):
    """Turn uint8 batches into normalised ones, at random while training.

    Args:
        mean: Per channel, of values from 0 to 1.
        std: Per channel, of values from 0 to 1.
        strengths: How much changes.
        share: Random numbers are drawn for whole batches, of which this part is made here.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Triple,
        std: Triple,
        strengths: Strengths | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.strengths, self.share = strengths or Strengths(), share or Share()
        self.generator: torch.Generator | None = None  # torch's own
        deviation = torch.tensor(std)
        self.register_buffer("scale", 1 / deviation, persistent=False)
        self.register_buffer("shift", -torch.tensor(mean) / deviation, persistent=False)

    def seed(self, seed: int) -> None:
        """Draw from now on what depends on this seed alone, whatever else draws."""
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 to (B, 3, S, S) float32."""
        if not self.training:
            return self._normalise(_images(pixels))
        settings, order = self.settings(len(pixels), pixels.shape[1])
        stained = self.strengths.stain > 0
        if pixels.is_cuda:
            settings = settings.pin_memory().to(pixels.device, non_blocking=True)
            if nvrtc.missing_module() is None:
                return augment(pixels, settings, order, self.scale, self.shift, stain=stained)
        images = warp(_images(pixels), settings[:, :6].reshape(-1, 2, 3))
        if stained:
            images = change_stain(images, settings[:, 10:].reshape(-1, 3, 4))
        return self._normalise(change_colour(images, settings[:, 6:10], order).clamp(0, 1))

    def settings(self, batch: int, side: int) -> tuple[Tensor, list[int]]:
        """Draw for ``batch`` images what ``kernels.augment`` takes.

        Returns:
            (B, 22) float32, and the order of the four changes of colour.
        """
        whole, given = batch * self.share.ranks, (self.strengths, self.generator)
        maps = draw_maps(whole, side, *given)
        colours, order = draw_colours(whole, *given)
        stains = draw_stains(whole, self.strengths.stain, self.generator)
        drawn = torch.cat([maps.flatten(1), colours, stains.flatten(1)], 1)
        return self.share.of(drawn), order

    def blend(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Blend each of (B, 3, S, S) images with its neighbour.

        Returns:
            The blends, and (B,) what of each is still the image.
        """
        whole = len(images) * self.share.ranks
        drawn = self.share.of(draw_shares(whole, self.strengths.mixup, self.generator))
        shares = (drawn.pin_memory() if images.is_cuda else drawn).to(
            images.device, non_blocking=True
        )
        return torch.lerp(neighbours(images), images, shares[:, None, None, None]), shares

    def pixels(self, images: Tensor) -> Tensor:
        """Return (B, 3, S, S) normalised images as (B, S, S, 3) uint8, rounded."""
        values = (images - self.shift[:, None, None]) / self.scale[:, None, None] * 255
        return values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()

    def _normalise(self, images: Tensor) -> Tensor:
        return images * self.scale[:, None, None] + self.shift[:, None, None]


def _images(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255


def neighbours(values: Tensor) -> Tensor:
    """Exchange the first with the second along the first axis, the third with the fourth and so on.

    Neighbours are in the same part of a batch, however many processes share it, as long as the
    parts are even.
    """
    paired = len(values) // 2 * 2
    exchanged = values[:paired].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.cat([exchanged, values[paired:]])


def shrink(pixels: Tensor, side: int) -> Tensor:
    """Bring (B, S, S, 3) uint8 pixels to a smaller side, antialiased as images are when read."""
    images = F.interpolate(
        pixels.permute(0, 3, 1, 2).float(), (side, side), mode="bilinear", antialias=True
    )
    return images.round().byte().permute(0, 2, 3, 1).contiguous()


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Look up each place of the result in (B, C, S, S) images, bilinearly, reflecting outside.

    Args:
        images: Of any values.
        maps: (B, 2, 3), from a place (column, row) of the result to one of the image, in pixels.
    """
    side = images.shape[-1]
    line = torch.arange(side, device=images.device, dtype=torch.float32)
    row, column = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack([column, row, torch.ones_like(row)], -1)  # [S, S, 3]
    found = torch.einsum("bkl,ijl->bijk", maps, places)
    # In the units of grid_sample the image reaches from -1 to 1, its outermost edges.
    grid = (2 * found + 1) / side - 1
    return F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)


def change_stain(images: Tensor, maps: Tensor) -> Tensor:
    """Map the optical densities of (B, 3, S, S) images of values from 0 to 1.

    Args:
        images: Red, green and blue.
        maps: (B, 3, 4), affine.
    """
    density = -images.clamp(min=_LEAST).log()
    mapped = torch.einsum("bkc,bchw->bkhw", maps[..., :3], density) + maps[..., 3, None, None]
    return (-mapped).exp().clamp(0, 1)


def change_colour(images: Tensor, factors: Tensor, order: list[int]) -> Tensor:
    """Change brightness, contrast, saturation and hue of (B, 3, S, S) images.

    Args:
        images: Of values from 0 to 1.
        factors: (B, 4): a summand, two factors, and a part of the colour circle.
        order: Of the four, counted from 0.
    """
    images = images.clamp(0, 1)
    steps = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for kind in order:
        change = factors[:, kind] * (2 * math.pi if kind == 3 else 1)
        images = steps[kind](images, change)
    return images
