"""MedMamba: a convolutional and a state-space branch per block, with a residual.

Yue and Li 2024, "MedMamba: Vision Mamba for Medical Image Classification", arXiv:2403.03849.
Layers carry the published code's names, so that its weights load. Tensors are (B, H, W, C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambamic.models.layers import (
    LayerNorm,
    NormalisedSequence,
    PatchMerging,
    Stage,
    StochasticDepth,
    channel_shuffle,
    channels_last,
    check_image,
    init_weights,
    stochastic_depth_rates,
)
from mambamic.models.ss2d import GatedScan


@dataclass(frozen=True)
class MedMambaConfig:
    """The sizes of a variant: blocks and channels per stage."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]


class PatchEmbedding(nn.Module):
    """Non-overlapping 4x4 patches, projected and normalised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, H // 4, W // 4, C)."""
        embedded: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return embedded


class SS2D(GatedScan):
    """Gated scan, then a projection back to the model's width."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, d_model) to the same shape."""
        projected: Tensor = self.out_proj(self.gated_scan(x))
        return projected


def conv_branch(dim: int) -> nn.Sequential:
    """Build the convolutional branch [conv33conv33conv11], channels first."""
    return NormalisedSequence(
        nn.BatchNorm2d(dim),
        nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        nn.BatchNorm2d(dim),
        nn.ReLU(),
        nn.Conv2d(dim, dim, kernel_size=3, padding=1),
        nn.BatchNorm2d(dim),
        nn.ReLU(),
        nn.Conv2d(dim, dim, kernel_size=1),
        nn.ReLU(),
    )


class MedMambaBlock(nn.Module):
    """Convolutions on the left half, the state-space layer on the right [SS_Conv_SSM]."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(dim // 2)
        self.self_attention = SS2D(dim // 2)
        self.drop_path = StochasticDepth(drop_path)
        self.conv33conv33conv11 = conv_branch(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        left, right = x.chunk(2, dim=-1)
        left = channels_last(self.conv33conv33conv11, left)
        right = self.drop_path(self.self_attention(self.ln_1(right)))
        return x + channel_shuffle(left, 2, right)


class MedMamba(nn.Module):
    """The whole network: patch embedding, four stages, mean over positions, linear head."""

    minimum_size = 32  # the smallest input that still has one position in the last stage

    def __init__(self, config: MedMambaConfig, num_classes: int) -> None:
        super().__init__()
        dims, depths = config.dims, config.depths
        self.patch_embed = PatchEmbedding(dims[0])
        self.layers = nn.ModuleList(
            Stage(
                [MedMambaBlock(dim, rate) for rate in rates],
                PatchMerging(dim) if dim != dims[-1] else None,
            )
            for dim, rates in zip(dims, stochastic_depth_rates(depths), strict=True)
        )
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Classify normalised images.

        Args:
            x: (B, 3, H, W), each side at least 32 pixels.

        Returns:
            Logits (B, num_classes).

        Raises:
            ShapeError: The input is too small or has not three channels.
        """
        check_image(x, self.minimum_size, square=False)
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        for stage in self.layers:
            x = stage(x)
        logits: Tensor = self.head(x.mean(dim=(1, 2)))
        return logits
