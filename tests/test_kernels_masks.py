"""The masks between the branches on the GPU against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mambamic.kernels import masks

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_float64(dtype: torch.dtype) -> None:
    tensors = [(torch.randn(2, 5, 7, 24) * 2).to("cuda", dtype) for _ in range(6)]
    tracked = [tensor.requires_grad_() for tensor in tensors[:4]]
    exact = [tensor.detach().double().requires_grad_() for tensor in tracked]
    assert masks.supported(*tracked)
    got = masks.masks(*tracked)
    a, b, local, global_ = exact
    expected = torch.sigmoid(F.relu(a)) * global_, torch.sigmoid(F.gelu(b)) * local
    torch.autograd.backward(got, tensors[4:])
    torch.autograd.backward(expected, [grad.double() for grad in tensors[4:]])
    pairs = [*zip(got, expected, strict=True)]
    for mine, want in zip(tracked, exact, strict=True):
        assert mine.grad is not None
        assert want.grad is not None
        pairs.append((mine.grad, want.grad))
    for mine, want in pairs:
        difference = (mine.detach().double() - want.detach()).norm() / want.detach().norm()
        assert float(difference) < TOLERANCE[dtype]


def test_what_is_not_supported() -> None:
    x = torch.zeros(2, 8).cuda()
    assert masks.supported(x, x)
    assert not masks.supported(x, x.half())
    assert not masks.supported(torch.zeros(3).cuda())
