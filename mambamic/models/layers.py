"""Small layers that both networks share. Tensors are (B, H, W, C) unless said otherwise."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambamic.errors import ShapeError
from mambamic.kernels import batch_norm as batch_norm_kernel
from mambamic.kernels import norm, shuffle


def channel_shuffle(
    x: Tensor, groups: int, rest: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """View the channels as (groups, C / groups), transpose, flatten.

    Args:
        x: (B, H, W, C), or its first channels.
        groups: How many.
        rest: The other channels.
        transposed: Whether height and width change places as well.
    """
    if shuffle.supported(x) and (rest is None or rest.dtype == x.dtype):
        return shuffle.shuffle(x, rest, groups, transposed=transposed)
    x = x if rest is None else torch.cat([x, rest], dim=-1)
    x = x.transpose(1, 2) if transposed else x
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

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise the last dimension, and multiply by SiLU(``gate``) where one is given."""
        if norm.supported(x):
            return norm.layer_norm(x, self.weight, self.bias, self.eps, gate)
        with torch.autocast(x.device.type, enabled=False):
            normalised = F.layer_norm(
                x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )
        return normalised if gate is None else normalised * F.silu(gate)


def batch_norm(layer: nn.BatchNorm2d, x: Tensor, *, relu: bool = False) -> Tensor:
    """Apply a batch normalisation, and a ReLU behind it, as one where a kernel can (training)."""
    if not (layer.training and batch_norm_kernel.supported(x)):
        normalised: Tensor = layer(x)
        return F.relu(normalised) if relu else normalised
    mean, var, momentum = layer.running_mean, layer.running_var, layer.momentum
    assert mean is not None
    assert var is not None
    assert momentum is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    return batch_norm_kernel.batch_norm(
        x, mean, var, layer.weight, layer.bias, momentum, layer.eps, relu=relu
    )


class NormalisedSequence(nn.Sequential):
    """Layers in sequence, in which a batch normalisation takes the ReLU behind it along."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        layers, taken = [*self, nn.Identity()], False
        for layer, following in pairwise(layers):
            if taken:
                taken = False
            elif isinstance(layer, nn.BatchNorm2d):
                taken = isinstance(following, nn.ReLU)
                x = batch_norm(layer, x, relu=taken)
            else:
                x = layer(x)
        return x


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
        kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(survival)
        return x * (kept / survival)


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
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        patches = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, row, W/2, column, C]
        phases = patches.permute(0, 1, 3, 4, 2, 5).flatten(3)  # by column, then by row
        merged: Tensor = self.reduction(self.norm(phases))
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
