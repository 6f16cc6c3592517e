"""The native CPU scan against the float64 reference: every instruction set that is here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.kernels import cpu, reference

LEVELS = cpu.available_levels()
NAMES = ("x", "projections", "dt_weight", "dt_bias", "A", "skip")

# Image, channels, rank, states. Lengths 1, 49, 65, 196, 784, 3136; widths below, between and
# above the lanes of a vector; the reference's gradients take long where L and D are both large.
SHAPES = [
    (1, 1, 24, 2, 16),
    (7, 7, 24, 2, 16),
    (5, 13, 7, 1, 16),
    (14, 14, 24, 1, 16),
    (28, 28, 7, 3, 16),
    (56, 56, 2, 1, 16),
    (6, 9, 35, 3, 5),
    (4, 4, 5, 1, 64),
]
# Of the largest value; the half precisions are those of the result's own rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@functools.cache
def inputs(
    batch: int, height: int, width: int, channels: int, rank: int, states: int
) -> tuple[Tensor, ...]:
    """Parameters as a freshly initialised model has them: slow and fast states, small steps."""
    random = torch.Generator().manual_seed(7)
    normal = functools.partial(torch.randn, generator=random)
    decay = -torch.arange(1, states + 1).expand(4, channels, states) * (
        1 + 0.1 * normal(4, channels, states)
    )
    return (
        normal(batch, height, width, channels),
        normal(batch, height, width, 4, rank + 2 * states),
        normal(4, channels, rank) * rank**-0.5,
        -5 + 2 * normal(4, channels),
        decay.clamp(max=-0.01),
        1 + normal(4, channels),
    )


def exact(tensors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """The reference's result and gradients in float64, and the gradient that was sent back."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    grad_y = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(8))
    before = torch.get_num_threads()
    # Thousands of small operations: where cores are shared, their threads wait for one another.
    torch.set_num_threads(1)
    try:
        y = reference.selective_scan_2d(*leaves)
        return y.detach(), torch.autograd.grad(y, leaves, grad_y.double()), grad_y
    finally:
        torch.set_num_threads(before)


cached_exact = functools.cache(lambda *shape: exact(inputs(*shape)))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the largest expected value."""
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found.double() - expected).abs().max() / scale)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_agrees_with_reference(
    level: str, shape: tuple[int, ...], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    tensors = inputs(batch, *shape)
    y, grads, grad_y = cached_exact(batch, *shape)
    assert error(cpu.forward(*tensors), y) < TOLERANCE[torch.float32]
    for name, found, expected in zip(NAMES, cpu.backward(grad_y, *tensors), grads, strict=True):
        assert error(found, expected) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    rounded = tuple(tensor.to(dtype) for tensor in inputs(3, 14, 14, 24, 1, 16))
    y, grads, grad_y = exact(rounded)
    found = cpu.forward(*rounded)
    assert found.dtype == dtype
    assert error(found, y) < TOLERANCE[dtype]
    for name, grad, expected in zip(NAMES, cpu.backward(grad_y, *rounded), grads, strict=True):
        assert grad.dtype == dtype
        assert error(grad, expected) < TOLERANCE[dtype], name


def test_what_float16_cannot_hold_becomes_its_largest() -> None:
    x, projections, dt_weight, dt_bias, A, skip = inputs(1, 7, 7, 24, 2, 16)
    tensors = (x.half(), projections.half(), dt_weight, dt_bias, A, skip.sign() * 1e5)
    found, expected = cpu.forward(*tensors), reference.selective_scan_2d(*tensors)
    assert int((expected.abs() == 65504).sum()) > 100
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.5)


def test_each_gradient_has_the_dtype_of_its_input() -> None:
    x, projections, *parameters = inputs(1, 7, 7, 24, 2, 16)
    mixed = (x.half(), projections.half(), *parameters)
    grads = cpu.backward(torch.ones_like(x), *mixed)
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in mixed]
    assert not any(grad.requires_grad for grad in grads)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("own_threads", [False, True], ids=["openmp", "own"])
def test_bits_do_not_depend_on_threads(own_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu._openmp() is not None, "torch has OpenMP threads that the scan does not use"
    if own_threads:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    tensors = inputs(3, 28, 28, 40, 2, 16)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        grads = cpu.backward(torch.ones_like(tensors[0]), *tensors)
        results.append((cpu.forward(*tensors), *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [-30.0, -15.0, 0.0, 30.0])
@pytest.mark.parametrize("decay", [-1e-6, -1.0, -1e4, -1e30])
def test_extreme_steps_and_decays(
    level: str, bias: float, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    x, projections, dt_weight, dt_bias, A, skip = inputs(1, 5, 13, 7, 1, 16)
    tensors = (
        *(x, projections, dt_weight),
        *(torch.full_like(dt_bias, bias), torch.full_like(A, decay), torch.zeros_like(skip)),
    )
    y, grads, grad_y = exact(tensors)
    assert error(cpu.forward(*tensors), y) < TOLERANCE[torch.float32]
    for name, found, expected in zip(NAMES, cpu.backward(grad_y, *tensors), grads, strict=True):
        assert torch.isfinite(found).all(), name
        # Where A is this large its gradient is below the smallest float32.
        if expected.abs().max() > 1e-30:
            assert error(found, expected) < 2 * TOLERANCE[torch.float32], name


@pytest.mark.parametrize("level", LEVELS)
def test_each_step_is_accurate_however_small(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pixel, one state and B = C = x = 1, y is four times softplus of the bias."""
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    bias = torch.linspace(-80, 80, 3201)
    channels = len(bias)
    projections = torch.tensor([0.0, 1.0, 1.0]).expand(1, 1, 1, 4, 3)
    y = cpu.forward(
        torch.ones(1, 1, 1, channels),
        projections,
        torch.zeros(4, channels, 1),
        bias.expand(4, channels),
        -torch.ones(4, channels, 1),
        torch.zeros(4, channels),
    )
    expected = 4 * torch.logaddexp(bias.double(), torch.zeros(1, dtype=torch.float64))
    # exp(-80) carries the rounding of its argument: 80 * 2^-24.
    torch.testing.assert_close(y.double().flatten(), expected, rtol=1e-5, atol=0)
    ordinary = bias.abs() < 16
    torch.testing.assert_close(
        y.double().flatten()[ordinary], expected[ordinary], rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["x", "projections", "dt_bias", "A"])
def test_nan_is_not_hidden(level: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    tensors = dict(zip(NAMES, inputs(1, 7, 7, 24, 2, 16), strict=True))
    tensors[name] = tensors[name].clone()
    tensors[name].flatten()[0] = float("nan")
    assert cpu.forward(*tensors.values()).isnan().any()


def test_the_caller_keeps_its_subnormal_numbers() -> None:
    cpu.forward(*inputs(1, 7, 7, 24, 2, 16))
    assert float(torch.tensor(1e-40) * 1) > 0


def test_strided_input() -> None:
    x, projections, *parameters = inputs(3, 5, 13, 7, 1, 16)
    across = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.cat([projections, projections], -1)[..., : projections.shape[-1]]
    assert not across.is_contiguous()
    assert not wide.is_contiguous()
    expected = cpu.forward(x, projections, *parameters)
    assert torch.equal(cpu.forward(across, wide, *parameters), expected)


def test_empty_batch() -> None:
    x, projections, *parameters = inputs(1, 7, 7, 24, 2, 16)
    nothing = (x[:0], projections[:0], *parameters)
    assert cpu.forward(*nothing).shape == (0, 7, 7, 24)
    grads = cpu.backward(x[:0], *nothing)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in nothing]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused(name: str) -> None:
    tensors = dict(zip(NAMES, inputs(1, 7, 7, 24, 2, 16), strict=True))
    tensors[name] = tensors[name][..., :-1]
    with pytest.raises(ShapeError, match="expected"):
        cpu.forward(*tensors.values())


def test_what_the_kernel_cannot_take_is_refused() -> None:
    tensors = inputs(1, 7, 7, 24, 2, 16)
    with pytest.raises(UsageError, match="float64"):
        cpu.forward(*(tensor.double() for tensor in tensors))
    with pytest.raises(UsageError, match="meta"):
        cpu.forward(tensors[0].to("meta"), *tensors[1:])
    with pytest.raises(ShapeError, match="grad_y"):
        cpu.backward(tensors[0][:, 1:], *tensors)
    with pytest.raises(ShapeError, match="at most 64 states"):
        cpu.forward(*inputs(1, 2, 2, 4, 1, 65))
    with pytest.raises(ShapeError, match="empty"):
        cpu.forward(tensors[0][:, :0], tensors[1][:, :0], *tensors[2:])
    with pytest.raises(ShapeError, match="4 dimensions"):
        cpu.forward(tensors[0][0], *tensors[1:])


@pytest.mark.usefixtures("threads")
def test_says_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    assert cpu.unavailable() is None
    assert cpu.describe() == f"{LEVELS[-1]}, 1 thread"
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, "baseline")
    assert cpu.describe() == "baseline, 1 thread"
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, "mmx")
    assert "'mmx'" in (cpu.unavailable() or "")
    with pytest.raises(BackendError, match="baseline"):
        cpu.forward(*inputs(1, 7, 7, 24, 2, 16))


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "damaged"])
def test_without_the_library(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "_scan2d.so"
    if content:
        library.write_bytes(content)
    monkeypatch.setattr(cpu, "_LIBRARY", library)
    cpu._load.cache_clear()
    try:
        assert "pip install" in (cpu.unavailable() or "")
        with pytest.raises(BackendError, match="pip install"):
            cpu.forward(*inputs(1, 7, 7, 24, 2, 16))
    finally:
        cpu._load.cache_clear()
