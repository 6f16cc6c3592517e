"""Channel shuffles on the GPU against torch's own steps: equal to the bit, forward and backward."""

from __future__ import annotations

import pytest
import torch

from mambamic.kernels import shuffle

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("first", "rest", "groups", "transposed"),
    [
        (3, 9, 6, True),
        (48, 0, 24, False),
        (12, 36, 24, True),
        (96, 96, 48, False),
        (48, 48, 2, False),
    ],
)
def test_equals_the_steps_one_by_one(
    first: int, rest: int, groups: int, transposed: bool, dtype: torch.dtype
) -> None:
    """What is shuffled are parts of wider rows, as the networks have them."""
    values = torch.randn(2, 7, 5, 2 * (first + rest)).to("cuda", dtype)
    height, width = (5, 7) if transposed else (7, 5)
    grad = torch.randn(2, height, width, first + rest).to("cuda", dtype)
    results = []
    for fused in (True, False):
        tracked = values.clone().requires_grad_()
        a = tracked[..., :first]
        b = tracked[..., first + 3 : first + 3 + rest] if rest else None
        if fused:
            assert shuffle.supported(a)
            y = shuffle.shuffle(a, b, groups, transposed=transposed)
        else:
            y = a if b is None else torch.cat([a, b], dim=-1)
            y = y.transpose(1, 2) if transposed else y
            y = y.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)
        y.backward(grad)
        assert tracked.grad is not None
        results.append((y.detach(), tracked.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_an_empty_batch() -> None:
    empty = torch.zeros(0, 4, 4, 8).cuda()
    assert shuffle.shuffle(empty, empty, 4, transposed=True).shape == (0, 4, 4, 16)
