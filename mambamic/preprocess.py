"""From an RGB image of any size to the square that a model takes, as the checkpoint states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mambamic.errors import UsageError

Pixels: TypeAlias = NDArray[np.uint8]  # RGB, the last axis of 3
RESIZE_RULES = ("stretch", "shorter_side")
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a model.

    Args:
        input_size: Side of the square in pixels.
        resize: ``stretch`` brings the whole image to the square, as the published evaluation
            does; ``shorter_side`` keeps the aspect ratio and cuts out the centre.
        interpolation: ``bilinear`` or ``bicubic``; both are antialiased, as Pillow does it.
        mean: Per channel, of values from 0 to 1.
        std: Per channel, of values from 0 to 1.
    """

    input_size: int = 224
    resize: str = "stretch"
    interpolation: str = "bilinear"
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        """Refuse rules that do not exist."""
        for field, known in (("resize", RESIZE_RULES), ("interpolation", tuple(INTERPOLATIONS))):
            value = getattr(self, field)
            if value not in known:
                raise UsageError(f"{field} {value!r}", f"one of {', '.join(known)}", "choose one")

    def pixels(self, image: Image.Image | Pixels) -> Pixels:
        """Bring an image to the model's size.

        Args:
            image: (H, W, 3) uint8, or of mode RGB; any other mode is converted by Pillow.

        Returns:
            (input_size, input_size, 3) uint8.
        """
        side = self.input_size
        if isinstance(image, np.ndarray):
            if image.shape == (side, side, 3):
                return image
            image = Image.fromarray(image)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        box = self.box(rgb.size)
        if box != (0, 0, side, side):
            rgb = rgb.resize((side, side), INTERPOLATIONS[self.interpolation], box=box)
        return np.asarray(rgb)

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of an image that the model sees: left, top, right, bottom.

        Args:
            size: Width and height in pixels.
        """
        return self._centre(size) if self.resize == "shorter_side" else (0, 0, *size)

    def normalise(self, batch: Pixels) -> NDArray[np.float32]:
        """Scale pixels to the range the model was trained on.

        Args:
            batch: (B, H, W, 3) uint8.

        Returns:
            (B, 3, H, W) float32, ``(value / 255 - mean) / std``, contiguous.
        """
        mean = np.asarray(self.mean, np.float32) * 255
        scale = 1 / (np.asarray(self.std, np.float32) * 255)
        scaled = (batch.astype(np.float32) - mean) * scale
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    @staticmethod
    def _centre(size: tuple[int, int]) -> tuple[float, float, float, float]:
        # Resizing and cutting in one step: an image of 1 x 1,000,000 pixels, first brought to a
        # shorter side of 224, would need terabytes.
        width, height = size
        side = min(size)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)
