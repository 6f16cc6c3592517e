"""Augmentation on the device, in the ways in which microscopy images really differ."""

from __future__ import annotations

from typing import Any

import torch
from kornia import augmentation
from torch import Tensor, nn

from mambamic.kernels import nvrtc
from mambamic.kernels.augment import augment
from mambamic.preprocess import Triple


class Augmentation(nn.Module):
    """Turn uint8 batches into normalised ones, at random while training.

    A cell has no up or down: any rotation, both flips, a change of scale and of place. Stains
    and lamps differ: brightness, contrast, saturation and a little hue.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.normalise = augmentation.Normalize(mean=mean, std=std)
        self.affine = augmentation.RandomAffine(
            degrees=180.0,
            translate=(0.06, 0.06),
            scale=(0.8, 1.2),
            p=1.0,
            padding_mode="reflection",
        )
        self.geometry = augmentation.AugmentationSequential(
            augmentation.RandomHorizontalFlip(p=0.5),
            augmentation.RandomVerticalFlip(p=0.5),
            self.affine,
        )
        self.colour = augmentation.ColorJiggle(0.2, 0.2, 0.2, 0.03, p=0.8)
        deviation = torch.tensor(std)
        self.register_buffer("scale", 1 / deviation, persistent=False)
        self.register_buffer("shift", -torch.tensor(mean) / deviation, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 to (B, 3, S, S) float32."""
        if self.training and pixels.is_cuda and nvrtc.missing_module() is None:
            settings, order = self.settings(len(pixels), pixels.shape[1])
            settings = settings.pin_memory().to(pixels.device, non_blocking=True)
            return augment(pixels, settings, order, self.scale, self.shift)
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if self.training:
            images = self.colour(self.geometry(images)).clamp(0, 1)
        normalised: Tensor = self.normalise(images)
        return normalised

    def settings(self, batch: int, side: int) -> tuple[Tensor, list[int]]:
        """Draw what the steps above would draw, as ``kernels.augment`` takes it.

        Returns:
            (B, 10) float32, and the order of the four changes of colour.
        """
        shape = torch.Size((batch, 3, side, side))
        for step in (*self.geometry.children(), self.colour):
            # Wherever the images are: the host must read the order without waiting for the device.
            step.set_rng_device_and_dtype(torch.device("cpu"), torch.float32)
        drawn: list[Any] = [item.data for item in self.geometry.forward_parameters(shape)]
        across, down, warp = drawn
        matrix = self.affine.compute_transformation(torch.empty(0), warp, self.affine.flags)
        inverse = torch.linalg.inv(matrix)[:, :2]  # from a place of the result to one of the image
        flipped = torch.stack([across["batch_prob"], down["batch_prob"]], 1) > 0.5
        mirrored = torch.tensor([0.0, 0.0, side - 1.0]) - inverse
        inverse = torch.where(flipped[..., None], mirrored, inverse)
        colour = self.colour.forward_parameters(shape)
        names = ("brightness", "contrast", "saturation", "hue")
        factors = torch.stack([colour[f"{name}_factor"] for name in names], 1)
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        factors = torch.where(colour["batch_prob"][:, None] > 0.5, factors, neutral)
        factors[:, 0] -= 1  # the brightness is added
        return torch.cat([inverse.flatten(1), factors], 1), colour["order"].tolist()
