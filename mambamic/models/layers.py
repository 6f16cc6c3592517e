"""Small layers that both networks share. Tensors are (B, H, W, C) unless said otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambamic.errors import ShapeError


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """View the channels as (groups, C / groups), transpose, flatten."""
    grouped: Tensor = x.unflatten(-1, (groups, -1))
    return grouped.transpose(-1, -2).flatten(-2)


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a channels-first layer to a (B, H, W, C) tensor without moving any data."""
    result: Tensor = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return result


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels that keeps a half-precision input's dtype.

    Under autocast torch's own returns float32, which doubles the traffic of what follows; the
    statistics are float32 inside either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(
                x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )


class StochasticDepth(nn.Module):
    """Drop a whole branch per sample while training, and scale the survivors to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with samples zeroed at ``rate``; the input itself outside training."""
        if not self.training or self.rate == 0.0:
            return x
        survival = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return (
            x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(survival) / survival
        )


class PatchMerging(nn.Module):
    """Halve height and width and double the channels [PatchMerging2D].

    The four phases of each 2x2 patch are concatenated, normalised and projected. An odd last
    row or column is dropped.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H // 2, W // 2, 2 C)."""
        height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
        x = x[:, :height, :width]
        phases = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(phases, dim=-1)))
        return merged


class Stage(nn.Module):
    """Blocks at one resolution, then the merge to the next, except after the last [VSSLayer]."""

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H // 2, W // 2, 2 C), or to the same shape at the end."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


def check_image(x: Tensor, minimum: int, *, square: bool) -> None:
    """Refuse an input that the network cannot take.

    Args:
        x: What should be (B, 3, H, W).
        minimum: The least height and width in pixels.
        square: Whether height and width must be equal.

    Raises:
        ShapeError: With the shape that came and the one that was expected.
    """
    got = f"an input of shape {tuple(x.shape)}"
    if x.ndim != 4 or x.shape[1] != 3:
        raise ShapeError(got, "(batch, 3, height, width)", "pass normalised RGB images")
    height, width = x.shape[2:]
    if min(height, width) < minimum:
        raise ShapeError(
            got, f"at least {minimum} x {minimum} pixels", "resize the image, to 224 x 224 say"
        )
    if square and height != width:
        raise ShapeError(
            got,
            "a square image, because MambaMIC's feed-forward exchanges height and width",
            "resize or crop the image to a square",
        )


def init_weights(module: nn.Module) -> None:
    """Initialise one layer as published; for ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def stochastic_depth_rates(depths: tuple[int, ...], maximum: float = 0.1) -> list[list[float]]:
    """Return the rate of every block, per stage: rising linearly from 0 to ``maximum``."""
    total = sum(depths)
    rates = [maximum * i / max(1, total - 1) for i in range(total)]
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [rates[end - depth : end] for end, depth in zip(ends, depths, strict=True)]


def inverse_softplus(x: Tensor) -> Tensor:
    """Return what softplus maps to ``x``, accurately for small values."""
    return x + torch.log(-torch.expm1(-x))


def step_bias(*shape: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Draw step biases so that softplus of them is log-uniform in [low, high]."""
    step = torch.exp(torch.rand(shape) * (math.log(high) - math.log(low)) + math.log(low))
    return inverse_softplus(step.clamp(min=floor))
