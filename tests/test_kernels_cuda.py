"""The GPU kernel against the float64 reference, forward and backward, and its promises."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambamic.errors import BackendError
from mambamic.kernels import cuda, reference, selective_scan_2d

pytestmark = pytest.mark.gpu

SHAPES = {1: (1, 1), 49: (7, 7), 65: (5, 13), 196: (14, 14), 784: (28, 28), 3136: (56, 56)}
# Relative error of a whole tensor, ‖out - ref‖ / ‖ref‖, and what rounding the inputs leaves.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def make(
    batch: int, shape: tuple[int, int], d: int, rank: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    image = (normal(batch, *shape, d), normal(batch, *shape, 4, rank + 32))
    weights = (
        normal(4, d, rank) * rank**-0.5,
        torch.rand((4, d), generator=generator) * 4 - 5,
        -torch.exp(normal(4, d, 16) * 0.3) * torch.arange(1.0, 17),
        normal(4, d),
    )
    return tuple(t.to("cuda", dtype) for t in image) + tuple(t.cuda() for t in weights)


def error(got: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(got).all()
    return float(
        (got.detach().double() - expected.detach()).norm()
        / expected.detach().norm().clamp(min=1e-30)
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", SHAPES)
def test_agrees_with_reference(length: int, batch: int, dtype: torch.dtype) -> None:
    d, rank = (24, 1) if length > 1000 else (96, 6)
    inputs = make(batch, SHAPES[length], d, rank, dtype, seed=length + batch)
    exact = [t.double().requires_grad_() for t in inputs]
    expected = reference.selective_scan_2d(*exact)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).cuda()
    weight = weight.to(dtype)  # the gradient that arrives is in the output's dtype
    (expected * weight.double()).sum().backward()
    assert error(selective_scan_2d(*inputs, backend="cuda"), expected) < TOLERANCE[dtype]

    tracked = [t.requires_grad_() for t in inputs]
    y = selective_scan_2d(*tracked, backend="cuda")
    assert y.dtype == dtype
    y.backward(weight)
    for name, got, want in zip(("x", "projections", "dt_weight", "dt_bias", "A", "skip"), tracked,
                               exact, strict=True):  # fmt: skip
        assert got.grad is not None
        assert want.grad is not None
        assert error(got.grad, want.grad) < GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("d", [1, 7, 24, 48, 130, 192, 768])
@pytest.mark.parametrize("rank", [1, 3, 24])
def test_any_width(d: int, rank: int) -> None:
    inputs = make(2, (6, 9), d, rank, torch.float32, seed=d + rank)
    exact = [t.double().requires_grad_() for t in inputs]
    expected = reference.selective_scan_2d(*exact)
    expected.square().sum().backward()
    tracked = [t.requires_grad_() for t in inputs]
    y = selective_scan_2d(*tracked)
    assert error(y, expected) < 2e-6
    y.square().sum().backward()
    for got, want in zip(tracked, exact, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert error(got.grad, want.grad) < 2e-5


def test_is_deterministic_and_writes_every_element() -> None:
    inputs = make(5, (14, 14), 96, 3, torch.float16)
    runs = []
    for _ in range(3):
        torch.full((64 * 1024 * 1024,), float("nan"), device="cuda")  # poison what is reused
        tracked = [t.clone().requires_grad_() for t in inputs]
        y = selective_scan_2d(*tracked)
        y.sum().backward()
        runs.append([y.detach(), *(t.grad for t in tracked)])
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert first is not None
            assert second is not None
            assert torch.equal(first, second)


def test_extreme_steps_stay_finite() -> None:
    x, projections, dt_weight, dt_bias, A, skip = make(1, (7, 7), 24, 1, torch.float32)
    for bias in (-80.0, 80.0):
        tensors = [x, projections, dt_weight, torch.full_like(dt_bias, bias), A * 10, skip]
        tracked = [t.clone().requires_grad_() for t in tensors]
        y = selective_scan_2d(*tracked)
        y.sum().backward()
        assert torch.isfinite(y).all()
        for tensor in tracked:
            assert tensor.grad is not None
            assert torch.isfinite(tensor.grad).all()


def test_can_be_captured_in_a_graph() -> None:
    inputs = make(2, (14, 14), 48, 2, torch.float16)
    expected = selective_scan_2d(*inputs)  # compiles, which a capture must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = selective_scan_2d(*inputs)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_runs_in_a_thread_of_its_own_and_on_another_stream() -> None:
    inputs = make(2, (7, 7), 24, 1, torch.float32)
    expected = selective_scan_2d(*inputs)
    got: list[Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            got.append(selective_scan_2d(*inputs))
        stream.synchronize()

    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(got[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_leaves_the_current_device_alone() -> None:
    inputs = [tensor.to("cuda:1") for tensor in make(1, (5, 5), 32, 2, torch.float32)]
    tracked = [tensor.requires_grad_() for tensor in inputs]
    y = selective_scan_2d(*tracked)
    y.sum().backward()
    assert y.device.index == 1
    assert torch.cuda.current_device() == 0


def test_unsupported_sizes_are_refused() -> None:
    x, projections, dt_weight, dt_bias, A, skip = make(1, (2, 2), 8, 1, torch.float32)
    with pytest.raises(BackendError, match="float64"):
        cuda.forward(x.double(), projections, dt_weight, dt_bias, A, skip, keep=False)
    with pytest.raises(BackendError, match="d_state 8"):
        cuda.forward(x, projections[..., :17], dt_weight, dt_bias, A[..., :8], skip, keep=False)


def test_needs_no_compiler(tmp_path: Path, root: Path) -> None:
    """A process whose PATH has no compiler, with an empty cache, runs forward and backward."""
    script = (
        "import shutil, torch\n"
        "assert not any(map(shutil.which, ('cc', 'gcc', 'clang', 'nvcc', 'ptxas', 'c++')))\n"
        "from tests.test_kernels_cuda import make\n"
        "from mambamic.kernels import selective_scan_2d\n"
        "inputs = [t.requires_grad_() for t in make(1, (7, 7), 24, 1, torch.float16)]\n"
        "selective_scan_2d(*inputs, backend='cuda').sum().backward()\n"
        "torch.cuda.synchronize(); print('ran')\n"
    )
    env = dict(os.environ, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    env["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "ran", done.stderr
    assert list((tmp_path / "cache").rglob("*")), "the compiled kernel was not kept"
