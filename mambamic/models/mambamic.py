"""MambaMIC: a local and a global branch per block, and their interaction.

Zou et al. 2024, "MambaMIC: An Efficient Baseline for Microscopic Image Classification with State
Space Models", arXiv:2409.07896. Layers carry the published code's names, so that its weights
load; two tensors that it allocates and never uses are left out. Tensors are (B, H, W, C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambamic.kernels import masks
from mambamic.models.layers import (
    LayerNorm,
    NormalisedSequence,
    PatchMerging,
    Stage,
    StochasticDepth,
    batch_norm,
    channel_shuffle,
    channels_last,
    check_image,
    init_weights,
    stochastic_depth_rates,
)
from mambamic.models.ss2d import GatedScan

N_CHUNKS = 4  # the global branch scans its channels in four chunks with the same weights


@dataclass(frozen=True)
class MambaMICConfig:
    """The sizes of a variant: blocks and channels per stage."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]


class ConvNorm(nn.Module):
    """A 3x3 convolution of stride 2 and its batch normalisation (channels first)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(dim_in, dim_out, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / 2, W / 2)."""
        return batch_norm(self.bn, self.c(x))


class ExpandingConv(nn.Conv2d):
    """A depthwise 3x3 convolution that gives two outputs per input channel (channels first).

    Repeating the input makes it an ordinary depthwise convolution: for two outputs per group the
    GPU library's weight gradient takes one launch per group, four fifths of a training step.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 2 C, H, W)."""
        twice = x.permute(0, 2, 3, 1).unsqueeze(-1).expand(-1, -1, -1, -1, 2).flatten(-2)
        return F.conv2d(
            twice.permute(0, 3, 1, 2), self.weight, self.bias, padding=1, groups=self.out_channels
        )


def local_branch(dim: int) -> nn.Sequential:
    """Build the convolutional branch on half of the channels [Conv_branch], channels first.

    Its first normalisation stands before a zero-padded convolution.
    """
    return NormalisedSequence(
        nn.BatchNorm2d(dim),
        nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim),
        nn.BatchNorm2d(dim),
        nn.ReLU(),
        ExpandingConv(dim),
        nn.BatchNorm2d(2 * dim),
        nn.ReLU(),
        nn.Conv2d(2 * dim, dim, kernel_size=1),
        nn.BatchNorm2d(dim),
        nn.ReLU(),
    )


class LocallyAwareEnhancedFilter(nn.Module):
    """The feed-forward after the gate [PSFFN]: it exchanges height and width."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.dim, self.filtered = dim, dim // 4
        self.conv_0 = nn.Conv2d(dim_in, dim, kernel_size=1)
        self.conv_1 = nn.Conv2d(
            self.filtered, self.filtered, kernel_size=3, padding=1, groups=self.filtered
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim_in) to (B, W, H, dim)."""
        x = F.silu(F.linear(x, self.conv_0.weight.flatten(1), self.conv_0.bias))
        filtered, rest = x.split([self.filtered, self.dim - self.filtered], dim=-1)
        filtered = F.silu(channels_last(self.conv_1, filtered))
        return channel_shuffle(filtered, self.dim // 2, rest, transposed=True)


class REVSSM(GatedScan):
    """Gated scan, then the locally aware filter, plus the input [the published code's mamba]."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.PSFFN = LocallyAwareEnhancedFilter(self.d_inner, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, H, d_model) to the same shape; the input must be square."""
        filtered: Tensor = self.PSFFN(self.gated_scan(x))
        return x + filtered


class GlobalBranch(nn.Module):
    """Four chunks of the channels through one state-space layer [PVMLayer]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.mamba = REVSSM(dim // N_CHUNKS)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, H, C) to the same shape."""
        chunks = self.norm(x).unflatten(-1, (N_CHUNKS, -1)).permute(0, 3, 1, 2, 4)
        chunks = chunks.flatten(0, 1)  # [4 B, H, W, C / 4]: one call instead of four
        chunks = self.mamba(chunks) + self.skip_scale.to(chunks.dtype) * chunks
        merged = chunks.unflatten(0, (-1, N_CHUNKS)).permute(0, 2, 3, 1, 4).flatten(-2)
        normalised: Tensor = self.norm(merged)
        return normalised


class ChannelAttention(nn.Module):
    """Scale each channel by a sigmoid of its weighted mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size=1, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        mean = x.mean(dim=(1, 2), keepdim=True)
        return x * torch.sigmoid(mean * self.conv.weight.flatten().to(x.dtype))


class FeatureInteraction(nn.Module):
    """Modulate each branch by the other, mix and re-weight the channels [MIFA]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.DWConv = nn.Conv2d(half, half, kernel_size=3, padding=1, groups=half)
        self.attention = ChannelAttention(dim)

    def forward(self, local: Tensor, global_: Tensor) -> Tensor:
        """Map two (B, H, W, C / 2) tensors to (B, H, W, C)."""
        convolved = channels_last(self.DWConv, local), channels_last(self.DWConv, global_)
        a, b = self.masked(*convolved, local, global_)
        attended: Tensor = self.attention(channel_shuffle(a, a.shape[-1] // 2, b))
        return attended

    def masked(
        self, of_local: Tensor, of_global: Tensor, local: Tensor, global_: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the global branch masked by the local one, and the reverse."""
        if masks.supported(of_local, of_global, local, global_):
            return masks.masks(of_local, of_global, local, global_)
        local_mask, global_mask = torch.sigmoid(F.relu(of_local)), torch.sigmoid(F.gelu(of_global))
        return local_mask * global_, global_mask * local


class MambaMICBlock(nn.Module):
    """Local branch on the left half, global branch on the right, no residual [SS_Conv_SSM]."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.Conv_branch = local_branch(dim // 2)
        self.pvm_layer = GlobalBranch(dim // 2)
        self.drop_path = StochasticDepth(drop_path)
        self.MIFA = FeatureInteraction(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, H, C) to the same shape."""
        left, right = x.chunk(2, dim=-1)
        # Dense, because batch normalisation of a slice takes torch's slowest way.
        local = channels_last(self.Conv_branch, left.contiguous())
        global_ = channel_shuffle(self.drop_path(self.pvm_layer(right)), x.shape[-1] // 4)
        fused: Tensor = self.MIFA(local, global_)
        return fused


class MambaMIC(nn.Module):
    """The whole network: stem, four stages, mean over positions, linear head."""

    minimum_size = 29  # the smallest input that still has one position in the last stage

    def __init__(self, config: MambaMICConfig, num_classes: int) -> None:
        super().__init__()
        dims, depths = config.dims, config.depths
        self.patch_embed = nn.Sequential(
            ConvNorm(3, dims[0] // 2), nn.GELU(), ConvNorm(dims[0] // 2, dims[0])
        )
        self.layers = nn.ModuleList(
            Stage(
                [MambaMICBlock(dim, rate) for rate in rates],
                PatchMerging(dim) if dim != dims[-1] else None,
            )
            for dim, rates in zip(dims, stochastic_depth_rates(depths), strict=True)
        )
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Classify normalised images.

        Args:
            x: (B, 3, H, H), at least 29 pixels high.

        Returns:
            Logits (B, num_classes).

        Raises:
            ShapeError: The input is not square, too small, or has not three channels.
        """
        check_image(x, self.minimum_size, square=True)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for stage in self.layers:
            x = stage(x)
        logits: Tensor = self.head(x.mean(dim=(1, 2)))
        return logits
