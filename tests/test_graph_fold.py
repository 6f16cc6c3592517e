"""The folded parameters, computed with plainly, give what the modules give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.graph.fold import (
    ConvWeights,
    LocalWeights,
    MambaMICBlockWeights,
    StateSpaceWeights,
    fold_mambamic_block,
    fold_medmamba_block,
    fold_merge,
    inverse,
    shuffled,
    vector_order,
)
from mambamic.kernels import selective_scan_2d
from mambamic.models.layers import PatchMerging, channel_shuffle
from mambamic.models.mambamic import MambaMICBlock
from mambamic.models.medmamba import MedMambaBlock

CHANNELS = 64


def randomise(module: torch.nn.Module) -> Any:
    """Give every parameter and running statistic a value that matters."""
    torch.manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor) * 0.3
            tensor.data = noise.abs() + 0.5 if "var" in name else noise
    return module.eval()


def conv(x: Tensor, weights: ConvWeights, stride: int = 1) -> Tensor:
    """Convolve (B, H, W, C), with zero padding that keeps the size."""
    kernel = weights.weight
    groups = 1 if kernel.shape[1] == x.shape[-1] else x.shape[-1]
    result = F.conv2d(
        x.permute(0, 3, 1, 2), kernel, weights.bias, stride, kernel.shape[-1] // 2, groups=groups
    )
    return result.permute(0, 2, 3, 1)


def norm(x: Tensor, parameters: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *parameters)


def local(x: Tensor, weights: LocalWeights) -> Tensor:
    x = x * weights.scale + weights.shift
    for layer in weights.convs:
        x = F.relu(conv(x, layer))
    return x


def gated_scan(x: Tensor, weights: StateSpaceWeights) -> Tensor:
    x, gate = F.linear(x, weights.in_proj).chunk(2, dim=-1)
    x = F.silu(conv(x, weights.conv))
    y = selective_scan_2d(
        x,
        torch.einsum("bhwd,kpd->bhwkp", x, weights.x_proj),
        weights.dt_weight,
        weights.dt_bias,
        weights.A,
        weights.skip,
    )
    return norm(y, weights.norm) * F.silu(gate)


def mambamic_block(x: Tensor, weights: MambaMICBlockWeights) -> Tensor:
    half = x.shape[-1] // 2
    d = half // 4
    left = local(x[..., :half], weights.local)
    n = norm(x[..., half:][..., weights.gather], weights.norm)
    natural = n[..., inverse(weights.chunk)]
    chunks = []
    for chunk in natural.split(d, dim=-1):
        f = F.silu(conv(gated_scan(chunk, weights.state_space), weights.feed))
        f[..., weights.filtered] = F.silu(conv(f[..., weights.filtered], weights.filter))
        chunks.append(f.transpose(1, 2) + (1 + weights.skip_scale) * chunk)
    right = norm(torch.cat(chunks, dim=-1)[..., weights.chunk], weights.norm)
    out = torch.empty_like(x)
    out[..., weights.out_a] = torch.sigmoid(F.relu(conv(left, weights.interaction))) * right
    out[..., weights.out_b] = torch.sigmoid(F.gelu(conv(right, weights.interaction))) * left
    return out * torch.sigmoid(out.mean(dim=(1, 2), keepdim=True) * weights.attention)


def test_shuffled_is_channel_shuffle() -> None:
    for groups in (2, 16, 32):
        assert channel_shuffle(torch.arange(64), groups).tolist() == shuffled(64, groups)


@pytest.mark.parametrize("vectors", [True, False])
def test_mambamic_blocks_in_any_order(vectors: bool) -> None:
    blocks = [randomise(MambaMICBlock(CHANNELS, 0.0)) for _ in range(2)]
    merge = randomise(PatchMerging(CHANNELS))
    x = torch.randn(2, 6, 6, CHANNELS)
    halves = [torch.randperm(CHANNELS // 2) + start for start in (0, CHANNELS // 2)]
    order = torch.cat(halves).tolist()
    right = vector_order(CHANNELS // 2) if vectors else list(range(CHANNELS // 2))
    expected, got = x, x[..., order]
    for block in blocks:
        expected = block(expected)
        weights = fold_mambamic_block(block, order, right)
        got, order = mambamic_block(got, weights), weights.out_order
        assert torch.allclose(got, expected[..., order], atol=2e-5)
    merged = fold_merge(merge, order)
    phases = [got[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    again = F.linear(norm(torch.cat(phases, dim=-1), merged.norm), merged.weight)
    assert torch.allclose(again, merge(expected), atol=1e-4)


def test_vector_order_writes_whole_vectors() -> None:
    for channels in (96, 128, 192):
        block = MambaMICBlock(channels, 0.0).eval()
        right = vector_order(channels // 2)
        weights = fold_mambamic_block(block, range(channels), right)
        for places in (weights.out_a, weights.out_b):
            for start in range(0, channels // 2, 8):
                assert places[start] % 8 == 0
                assert places[start : start + 8] == list(range(places[start], places[start] + 8))


def test_medmamba_block() -> None:
    block = randomise(MedMambaBlock(CHANNELS, 0.0))
    x = torch.randn(2, 5, 7, CHANNELS)
    weights = fold_medmamba_block(block)
    left, right = x.chunk(2, dim=-1)
    left = local(left, weights.local)
    right = F.linear(gated_scan(norm(right, weights.norm), weights.state_space), weights.out_proj)
    got = x + channel_shuffle(torch.cat([left, right], dim=-1), 2)
    assert torch.allclose(got, block(x), atol=2e-5)
