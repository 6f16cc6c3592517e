"""The GPU scan's backward pass: stacked images, many channels, and the order of its sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambamic.kernels import cuda, cuda_backward
from tests.test_kernels_cuda import error, make

pytestmark = pytest.mark.gpu


def backward(grad: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, projections, dt_weight, dt_bias, A, skip = inputs
    _, states = cuda.forward(x, projections, dt_weight, dt_bias, A, skip, keep=True)
    return cuda_backward.backward(grad, x, projections, dt_weight, dt_bias, A, skip, states)


def stacked(images: Tensor, count: int) -> Tensor:
    """Lay ``count`` images each side by side: (B, H, W, ...) to (B / count, H, W, count, ...)."""
    grouped: Tensor = images.unflatten(0, (-1, count))
    return grouped.movedim(1, 3).contiguous()


def test_images_side_by_side_are_scanned_apart() -> None:
    x, projections, *weights = make(6, (5, 9), 24, 1, torch.float32)
    grad = torch.randn_like(x)
    of_x, of_projections, *of_weights = backward(grad, (x, projections, *weights))
    side_by_side = (stacked(x, 3), stacked(projections, 3), *weights)
    got = backward(stacked(grad, 3), side_by_side)
    assert torch.equal(got[0], stacked(of_x, 3))
    assert torch.equal(got[1], stacked(of_projections, 3))
    for mine, expected in zip(got[2:], of_weights, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_spread_over_blocks_that_do_not_fill_them(dtype: torch.dtype) -> None:
    """100 channels take two blocks of 56, and the last lanes have none."""
    inputs = make(2, (7, 7), 100, 6, dtype)
    grad = torch.randn_like(inputs[0])
    whole = backward(grad, inputs)
    x, projections, dt_weight, dt_bias, A, skip = inputs
    parts = [
        backward(
            grad[..., part].contiguous(),
            (
                x[..., part].contiguous(),
                projections,
                *(w[:, part] for w in (dt_weight, dt_bias, A, skip)),
            ),
        )
        for part in (slice(0, 48), slice(48, 100))
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(whole[0], torch.cat([part[0] for part in parts], -1).double()) < tolerance
    assert error(whole[1], parts[0][1].double() + parts[1][1].double()) < tolerance
    for i in range(2, 6):
        assert error(whole[i], torch.cat([part[i] for part in parts], 1).double()) < tolerance


def test_the_same_input_gives_the_same_bits() -> None:
    inputs = make(3, (14, 14), 96, 3, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    first = backward(grad, inputs)
    for other in (backward(grad, inputs) for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
