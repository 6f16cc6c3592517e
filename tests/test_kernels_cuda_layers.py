"""The fused layers on the GPU against the same arithmetic in torch, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.kernels import cuda_layers as layers

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CHANNELS = [24, 48, 192, 512]


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    difference = (got.double() - expected).norm() / expected.norm()
    assert difference < TOLERANCE[got.dtype]


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.double(), bias.double())


def convolve(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    channels = taps.shape[1]
    result = F.conv2d(
        x.permute(0, 3, 1, 2),
        taps.double().t().reshape(channels, 1, 3, 3),
        bias.double(),
        padding=1,
        groups=x.shape[-1],
    )
    return result.permute(0, 2, 3, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.full((16 * 1024 * 1024,), float("nan"), device="cuda")  # poison what is reused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", CHANNELS)
class TestNorms:
    def test_gather_norm(self, c: int, dtype: torch.dtype) -> None:
        x, gate = make(3, 5, 7, 2 * c, dtype=dtype), make(3, 2 * c)
        weight, bias = make(c), make(c)
        gather = torch.randperm(c, device="cuda", dtype=torch.int32)
        for g, offset in ((gate, None), (None, make(c))):
            scaled = x.double() if g is None else x.double() * g.double().view(3, 1, 1, -1)
            right = scaled[..., c:] if offset is None else scaled[..., c:] + offset.double()
            expected = norm(right[..., gather.long()], weight, bias)
            close(layers.gather_norm(x, g, offset, gather, weight, bias), expected)

    def test_split_norm(self, c: int, dtype: torch.dtype) -> None:
        x = make(2, 3, 7, 2 * c, dtype=dtype)
        scale, shift, weight, bias = (make(c) for _ in range(4))
        left, right = layers.split_norm(x, scale, shift, weight, bias)
        close(left, x[..., :c].double() * scale.double() + shift.double())
        close(right, norm(x[..., c:].double(), weight, bias))

    def test_gated_norm(self, c: int, dtype: torch.dtype) -> None:
        y, projected = make(2, 3, 5, 4, c, dtype=dtype), make(2, 3, 5, 8 * c, dtype=dtype)
        weight, bias = make(c), make(c)
        gate = F.silu(projected.double()[..., 4 * c :].unflatten(-1, (4, c)))
        expected = (norm(y.double(), weight, bias) * gate).flatten(-2)
        close(layers.gated_norm(y, projected, weight, bias), expected)

    def test_transposed_residual_norm(self, c: int, dtype: torch.dtype) -> None:
        x, filtered = make(3, 7, 7, c, dtype=dtype), make(3, 7, 7, c + 16, dtype=dtype)
        weight, bias = make(c), make(c)
        added = x.double() * 1.7 + F.silu(filtered[..., :c].double()).transpose(1, 2)
        close(
            layers.transposed_residual_norm(x, filtered, 1.7, weight, bias),
            norm(added, weight, bias),
        )

    def test_merge_norm(self, c: int, dtype: torch.dtype) -> None:
        x, gate = make(2, 5, 7, c, dtype=dtype), make(2, c)
        weight, bias = make(4 * c), make(4 * c)
        for g in (gate, None):
            scaled = x.double() if g is None else x.double() * g.double().view(2, 1, 1, -1)
            even = scaled[:, :4, :6]
            phases = [even[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            expected = norm(torch.cat(phases, dim=-1), weight, bias)
            close(layers.merge_norm(x, g, weight, bias), expected)

    def test_norm(self, c: int, dtype: torch.dtype) -> None:
        x, weight, bias = make(2, 3, 3, c, dtype=dtype), make(c), make(c)
        expected = norm(x.double(), weight, bias)
        close(layers.norm_(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strip", [7, 2, 1])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (5, 9), (2, 56)])
@pytest.mark.parametrize("c", [24, 192])
class TestDepthwise:
    @pytest.fixture(autouse=True)
    def _strip(self, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "_STRIPS", (strip,))

    def test_silu_of_some_channels(self, c: int, size: tuple[int, int], dtype: torch.dtype) -> None:
        x, taps, bias = make(3, *size, 2 * c, dtype=dtype), make(9, c), make(c)
        for offset in (0, c):
            expected = F.silu(convolve(x.double()[..., offset : offset + c], taps, bias))
            close(layers.depthwise(x, c, taps, bias, "silu", offset=offset), expected)

    def test_affine(self, c: int, size: tuple[int, int], dtype: torch.dtype) -> None:
        x, taps, bias = make(3, *size, 2 * c, dtype=dtype), make(9, c), make(c)
        scale, shift, gate = make(c), make(c), make(3, 2 * c)
        for g in (gate, None):
            gated = x.double() if g is None else x.double() * g.double().view(3, 1, 1, -1)
            moved = gated[..., :c] * scale.double() + shift.double()
            got = layers.depthwise(x, c, taps, bias, "relu", affine=(scale, shift, g))
            close(got, F.relu(convolve(moved, taps, bias)))

    def test_two_outputs_per_channel(
        self, c: int, size: tuple[int, int], dtype: torch.dtype
    ) -> None:
        x, taps, bias = make(3, *size, c, dtype=dtype), make(9, 2 * c), make(2 * c)
        expected = F.relu(convolve(x.double(), taps, bias))
        close(layers.depthwise(x, c, taps, bias, "relu"), expected)

    def test_scatters_into_its_own_rows(
        self, c: int, size: tuple[int, int], dtype: torch.dtype
    ) -> None:
        x, taps, bias = make(3, *size, 3 * c, dtype=dtype), make(9, c), make(c)
        expected = x.double()
        places = torch.randperm(2 * c)[:c].int().cuda()
        places[3] = -1
        convolved = convolve(F.silu(expected[..., 2 * c :]), taps, bias)
        kept = [i for i in range(c) if i != 3]
        expected[..., places[kept].long()] = convolved[..., kept]
        layers.depthwise(
            x, c, taps, bias, "none", offset=2 * c, input_silu=True, scatter=places, out=x
        )
        close(x, expected)

    def test_interact(self, c: int, size: tuple[int, int], dtype: torch.dtype) -> None:
        c *= 2
        local, global_ = (make(3, *size, c, dtype=dtype) for _ in range(2))
        taps, bias, attention = make(9, c), make(c), make(2 * c)
        out, gate, means = layers.interact(local, global_, taps, bias, attention)
        active, other = F.relu(local.double()), global_.double()
        a = torch.sigmoid(F.relu(convolve(active, taps, bias))) * other
        b = torch.sigmoid(F.gelu(convolve(other, taps, bias))) * active
        halves = [
            part for pair in zip(a.chunk(2, -1), b.chunk(2, -1), strict=True) for part in pair
        ]
        expected = torch.cat(halves, dim=-1)
        close(out, expected)
        mean = expected.mean(dim=(1, 2))
        close(gate, torch.sigmoid(mean * attention.double()))
        close(means, mean * torch.sigmoid(mean * attention.double()))
        empty, *same = layers.interact(local, global_, taps, bias, attention, keep=False)
        assert empty.numel() == 0
        assert torch.allclose(same[0], gate)
        assert torch.allclose(same[1], means, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(224, 224), (29, 33), (100, 61)])
def test_pixels(size: tuple[int, int], dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (2, *size, 3), device="cuda").byte()
    scale, shift = make(3).abs() / 60, make(3)
    x = pixels.double() * scale.double() + shift.double()
    for outputs in (48, 64):
        kernel, bias = make(outputs, 3, 3, 3) * 0.2, make(outputs)
        got = layers.stem(
            pixels, scale, shift, kernel.permute(2, 3, 1, 0).reshape(27, outputs), bias, dtype
        )
        convolved = F.conv2d(
            x.permute(0, 3, 1, 2), kernel.double(), bias.double(), stride=2, padding=1
        )
        close(got, F.gelu(convolved).permute(0, 2, 3, 1))
    height, width = size[0] // 4, size[1] // 4
    rows = x[:, : 4 * height, : 4 * width].unflatten(1, (height, 4)).unflatten(3, (width, 4))
    close(
        layers.patches(pixels, scale, shift, dtype),
        rows.permute(0, 1, 3, 2, 4, 5).flatten(3),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interleave_add(dtype: torch.dtype) -> None:
    x, left, right = make(2, 3, 5, 96, dtype=dtype), *(make(2, 3, 5, 48, dtype=dtype) for _ in "lr")
    expected = x.double() + torch.stack([F.relu(left), right], dim=-1).double().flatten(-2)
    close(layers.interleave_add_(x, left, right), expected)
