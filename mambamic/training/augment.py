"""Augmentation on the device, in the ways in which microscopy images really differ."""

from __future__ import annotations

from kornia import augmentation
from torch import Tensor, nn

from mambamic.preprocess import Triple


class Augmentation(nn.Module):
    """Turn uint8 batches into normalised ones, at random while training.

    A cell has no up or down: any rotation, both flips, a change of scale and of place. Stains
    and lamps differ: brightness, contrast, saturation and a little hue.
    """

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.normalise = augmentation.Normalize(mean=mean, std=std)
        self.geometry = augmentation.AugmentationSequential(
            augmentation.RandomHorizontalFlip(p=0.5),
            augmentation.RandomVerticalFlip(p=0.5),
            augmentation.RandomAffine(
                degrees=180.0,
                translate=(0.06, 0.06),
                scale=(0.8, 1.2),
                p=1.0,
                padding_mode="reflection",
            ),
        )
        self.colour = augmentation.ColorJiggle(0.2, 0.2, 0.2, 0.03, p=0.8)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 to (B, 3, S, S) float32."""
        images = pixels.permute(0, 3, 1, 2).float() / 255
        if self.training:
            images = self.colour(self.geometry(images)).clamp(0, 1)
        normalised: Tensor = self.normalise(images)
        return normalised
