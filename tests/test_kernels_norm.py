"""Layer normalisation on the GPU against float64, plain and gated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.kernels import norm

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("width", [8, 24, 48, 104, 384, 768])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_float64(dtype: torch.dtype, width: int, gated: bool) -> None:
    """The rows are halves of wider ones, as the networks have them."""
    generator = torch.Generator().manual_seed(width)
    shapes = [(3, 5, 7, 2 * width)] * 2 + [(width,)] * 2 + [(3, 5, 7, width)]
    whole, gates, weight, bias, grad = (
        torch.randn(shape, generator=generator).cuda() for shape in shapes
    )
    whole, gates, grad = whole.to(dtype), gates.to(dtype), grad.to(dtype)
    tracked = [tensor.requires_grad_() for tensor in (whole, gates, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tracked]
    x, z = whole[..., width:], gates[..., :width]
    assert norm.supported(x)
    y = norm.layer_norm(x, weight, bias, 1e-5, z if gated else None)
    expected = F.layer_norm(exact[0][..., width:], (width,), exact[2], exact[3], 1e-5)
    if gated:
        expected = expected * F.silu(exact[1][..., :width])
    y.backward(grad)
    expected.backward(grad.double())
    assert error(y.detach(), expected.detach()) < TOLERANCE[dtype]
    for got, want in zip(tracked, exact, strict=True):
        if want.grad is None:
            assert got.grad is None
            continue
        assert got.grad is not None
        assert error(got.grad, want.grad) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_unevenly_spaced_and_unaligned_rows_and_no_rows() -> None:
    weight, bias = torch.ones(8).cuda(), torch.zeros(8).cuda()
    values = torch.randn(6, 4, 9).cuda()
    for x in (
        values[..., 1:],
        values[:, :3, :8],
        values.transpose(0, 1)[..., :8],
        values[:0, 0, :8],
    ):
        expected = F.layer_norm(x, (8,), weight, bias, 1e-5)
        torch.testing.assert_close(norm.layer_norm(x, weight, bias, 1e-5), expected)


def test_what_is_not_supported() -> None:
    assert not norm.supported(torch.zeros(2, 8))  # on a CPU


@pytest.mark.gpu
def test_what_is_not_supported_on_a_gpu() -> None:
    assert norm.supported(torch.zeros(2, 8).cuda())
    for other in (torch.zeros(2, 12), torch.zeros(2, 776), torch.zeros(2, 8).double()):
        assert not norm.supported(other.cuda())
