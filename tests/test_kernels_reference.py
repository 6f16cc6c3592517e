"""The reference against its definition, written out index by index and with loops in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambamic.kernels import reference

Array = NDArray[np.float64]
# Batch, height, width, channels, rank, states: one pixel, one row, one column, and larger.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 5, 2, 1, 3),
    (2, 4, 1, 3, 2, 1),
    (2, 2, 3, 4, 2, 3),
    (1, 3, 3, 2, 3, 16),
]


def positions(direction: int, height: int, width: int) -> list[tuple[int, int]]:
    """The pixels of an image, as (row, column), in the order of one direction."""
    by_rows = [(row, column) for row in range(height) for column in range(width)]
    by_columns = [(row, column) for column in range(width) for row in range(height)]
    return [by_rows, by_columns, by_rows[::-1], by_columns[::-1]][direction]


def loops(
    x: Array, projections: Array, dt_weight: Array, dt_bias: Array, A: Array, skip: Array
) -> Array:
    """The definition with one number at a time."""
    batch, height, width, channels = x.shape
    rank, states = dt_weight.shape[2], A.shape[2]
    y = np.zeros_like(x)
    for b in range(batch):
        for k in range(4):
            for d in range(channels):
                state = [0.0] * states
                for i, j in positions(k, height, width):
                    values = projections[b, i, j, k]
                    dt, B, C = values[:rank], values[rank : rank + states], values[rank + states :]
                    raw = sum(dt_weight[k, d, r] * dt[r] for r in range(rank)) + dt_bias[k, d]
                    delta = math.log1p(math.exp(raw))
                    u = x[b, i, j, d]
                    for n in range(states):
                        state[n] = math.exp(delta * A[k, d, n]) * state[n] + delta * B[n] * u
                    y[b, i, j, d] += sum(C[n] * state[n] for n in range(states)) + skip[k, d] * u
    return y


def inputs(
    batch: int, height: int, width: int, channels: int, rank: int, states: int
) -> tuple[Array, ...]:
    random = np.random.default_rng([batch, height, width, channels, rank, states])
    return (
        random.normal(size=(batch, height, width, channels)),
        random.normal(size=(batch, height, width, 4, rank + 2 * states)),
        random.normal(size=(4, channels, rank)),
        random.normal(size=(4, channels)),
        -random.uniform(0.1, 4, size=(4, channels, states)),
        random.normal(size=(4, channels)),
    )


def tensors(*size: int) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in inputs(*size))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_loops(size: tuple[int, ...]) -> None:
    found = reference.selective_scan_2d(*tensors(*size))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), loops(*inputs(*size)), rtol=1e-12, atol=1e-12)


def test_one_pixel_by_hand() -> None:
    """No past: y is the sum over the directions of C delta B x + D x."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    projections = torch.tensor([0.0, 2.0, 3.0]).double().expand(1, 1, 1, 4, 3)
    weight = torch.zeros(4, 1, 1).double()
    bias = torch.full((4, 1), math.log(math.e - 1)).double()  # softplus of it is 1
    y = reference.selective_scan_2d(
        5 * one, projections, weight, bias, -torch.ones(4, 1, 1).double(), bias * 0 + 0.5
    )
    assert float(y) == pytest.approx(4 * (3 * 1 * 2 * 5 + 0.5 * 5))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 1), (2, 3), (4, 4)])
def test_cross_scan_index_by_index(height: int, width: int) -> None:
    image = torch.randn(2, height, width, 4, 3, generator=torch.Generator().manual_seed(0))
    sequences = reference.cross_scan(image)
    assert sequences.shape == (2, 4, height * width, 3)
    for k in range(4):
        for place, (row, column) in enumerate(positions(k, height, width)):
            assert torch.equal(sequences[:, k, place], image[:, row, column, k])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 1), (2, 3), (4, 4)])
def test_cross_merge_index_by_index(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(2, 4, height * width, 3, generator=generator, dtype=torch.float64)
    merged = reference.cross_merge(sequences, height, width)
    expected = torch.zeros(2, height, width, 3, dtype=torch.float64)
    for k in range(4):
        for place, (row, column) in enumerate(positions(k, height, width)):
            expected[:, row, column] += sequences[:, k, place]
    torch.testing.assert_close(merged, expected)


def test_gradients() -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in tensors(1, 2, 3, 2, 1, 2))
    assert torch.autograd.gradcheck(reference.selective_scan_2d, leaves)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
    ids=str,
)
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    rounded = tuple(tensor.to(dtype) for tensor in tensors(2, 4, 5, 3, 2, 4))
    found = reference.selective_scan_2d(*rounded)
    assert found.dtype == dtype
    exact = reference.selective_scan_2d(*(tensor.double() for tensor in rounded))
    assert (found.double() - exact).abs().max() < tolerance * exact.abs().max()


def test_what_float16_cannot_hold_becomes_its_largest() -> None:
    x, projections, dt_weight, dt_bias, A, skip = tensors(2, 4, 5, 3, 2, 4)
    steep = (dt_weight, dt_bias, A, skip.sign() * 1e5)
    half = reference.selective_scan_2d(x.half(), projections.half(), *steep)
    whole = reference.selective_scan_2d(x.half().double(), projections.half().double(), *steep)
    assert whole.abs().max() > 65504
    torch.testing.assert_close(half, whole.clamp(-65504, 65504).half(), rtol=1e-3, atol=0.5)
    lost = reference.narrowed(torch.tensor([float("nan")]), torch.float16)
    assert lost.isnan().all()


def test_images_of_a_batch_do_not_meet() -> None:
    x, projections, *parameters = tensors(3, 3, 4, 2, 1, 2)
    together = reference.selective_scan_2d(x, projections, *parameters)
    for index in range(3):
        part = slice(index, index + 1)
        alone = reference.selective_scan_2d(x[part], projections[part], *parameters)
        torch.testing.assert_close(together[part], alone)
