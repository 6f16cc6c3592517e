"""A network layer by layer, as torch runs it, with what lies between its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambamic.models.layers import check_image
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives.

    Args:
        feature_map: (B, H, W, C), of the last block of the stage that was asked for.
        features: (B, C), the mean over positions at the end.
        logits: (B, classes).
    """

    feature_map: Tensor
    features: Tensor
    logits: Tensor


def forward(model: MambaMIC | MedMamba, x: Tensor, stage: int = 4) -> Pass:
    """Run a network, and keep what lies before its head.

    Args:
        model: In evaluation mode.
        x: (B, 3, H, W), normalised.
        stage: Whose feature map is kept, from 1 to 4.

    Raises:
        ShapeError: The images are too small, or not square where they must be.
    """
    square = isinstance(model, MambaMIC)
    check_image(x, model.minimum_size, square=square)
    x = model.patch_embed(x.contiguous(memory_format=torch.channels_last))
    x = x.permute(0, 2, 3, 1) if square else x
    feature_map = x
    for number, layer in enumerate(model.layers, 1):
        modules: Any = layer
        for block in modules.blocks:
            x = block(x)
        if number == stage:
            feature_map = x
        if modules.downsample is not None:
            x = modules.downsample(x)
    features = x.mean(dim=(1, 2))
    return Pass(feature_map, features, model.head(features))
