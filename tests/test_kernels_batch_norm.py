"""Batch normalisation with ReLU on the GPU against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.kernels import batch_norm

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("channels", [8, 48, 104, 768])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_float64(dtype: torch.dtype, channels: int, relu: bool) -> None:
    """The mean is fifteen times the deviation, which naive sums of squares do not survive."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(3, channels, 9, 11, generator=generator) * 2 + 30
    x = x.to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.rand(channels, generator=generator) + 0.5).cuda()
    bias = torch.randn(channels, generator=generator).cuda()
    grad = torch.randn(x.shape, generator=generator).to("cuda", dtype)
    tracked = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tracked]
    running = torch.zeros(channels).cuda(), torch.ones(channels).cuda()
    wanted = torch.zeros(channels).double().cuda(), torch.ones(channels).double().cuda()
    assert batch_norm.supported(x)
    y = batch_norm.batch_norm(x, *running, weight, bias, 0.1, 1e-5, relu=relu)
    expected = F.batch_norm(exact[0], *wanted, exact[1], exact[2], True, 0.1, 1e-5)
    expected = F.relu(expected) if relu else expected
    y.backward(grad)
    expected.backward(grad.double())
    assert error(y.detach(), expected.detach()) < TOLERANCE[dtype]
    for got, want in zip(running, wanted, strict=True):
        assert error(got, want) < 1e-5
    for got, want in zip(tracked, exact, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert error(got.grad, want.grad) < 5 * TOLERANCE[dtype]  # ReLU's edge shifts by a rounding


def test_what_is_not_supported() -> None:
    assert batch_norm.supported(torch.zeros(1, 8, 2, 2).cuda())
    for other in (
        torch.zeros(1, 12, 2, 2),
        torch.zeros(1, 8, 2, 2).double(),
        torch.zeros(0, 8, 2, 2),
    ):
        assert not batch_norm.supported(other.cuda())
