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


def pack(projections: Tensor) -> Tensor:
    """Reorder (..., K, R + 2N) as ``scan_inference`` reads it, by the weights' own function."""
    rank = projections.shape[-1] - 32
    chooser = torch.eye(4 * (rank + 32), device="cuda").unflatten(0, (4, -1))
    return projections.flatten(-2) @ cuda.pack_projection(chooser).T.to(projections.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", SHAPES)
def test_inference_agrees_with_reference(length: int, batch: int, dtype: torch.dtype) -> None:
    d, rank = (24, 1) if length > 1000 else (96, 6)
    x, projections, *weights = make(batch, SHAPES[length], d, rank, dtype, seed=length + batch)
    expected = reference.selective_scan_2d(*(t.double() for t in (x, projections, *weights)))
    prepared = cuda.ScanWeights.of(*weights)
    y = cuda.scan_inference(x, pack(projections), prepared)
    assert y.dtype == dtype
    assert error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(7, 7), (28, 28), (13, 35)])
def test_stacked_scans_give_what_each_gives(shape: tuple[int, int], dtype: torch.dtype) -> None:
    stack, d, rank = 4, 24, 1
    x, projections, *weights = make(2 * stack, shape, d, rank, dtype)
    prepared = cuda.ScanWeights.of(*weights)
    alone = cuda.scan_inference(x, pack(projections), prepared)

    def side_by_side(t: Tensor) -> Tensor:
        joined: Tensor = t.unflatten(0, (2, stack))
        return joined.moveaxis(1, 3).contiguous()

    y = cuda.scan_inference(side_by_side(x), pack(side_by_side(projections)), prepared)
    assert torch.equal(y, side_by_side(alone))
    trained, states = cuda.forward(side_by_side(x), side_by_side(projections), *weights, keep=True)
    expected, expected_states = cuda.forward(x, projections, *weights, keep=True)
    assert torch.equal(trained, side_by_side(expected))
    assert torch.equal(states, expected_states)


@pytest.mark.parametrize("shape", [(28, 28), (56, 56), (13, 35)])
@pytest.mark.parametrize("d", [24, 96, 20])
def test_few_images_in_chunks_give_what_many_give(shape: tuple[int, int], d: int) -> None:
    x, projections, *weights = make(1, shape, d, 3, torch.float32)
    prepared = cuda.ScanWeights.of(*weights)
    one = cuda.scan_inference(x, pack(projections), prepared)
    many = torch.cuda.get_device_properties(0).multi_processor_count
    images, rows = (t.expand(many, *t.shape[1:]).contiguous() for t in (x, pack(projections)))
    for image in cuda.scan_inference(images, rows, prepared)[[0, -1]]:
        assert error(image, one[0].double()) < 2e-6


def test_a_view_is_read_where_it_lies() -> None:
    for d, offset in ((24, 8), (24, 3), (20, 0)):
        wide, projections, *weights = make(2, (9, 11), 64, 2, torch.float16)
        view = wide[..., offset : offset + d]
        narrow = [weight[:, :d].contiguous() for weight in weights]
        prepared = cuda.ScanWeights.of(*narrow)
        expected = cuda.scan_inference(view.contiguous(), pack(projections), prepared)
        y = cuda.scan_inference(view, pack(projections), prepared)
        assert y.is_contiguous()
        assert torch.equal(y, expected)
    transposed = view.transpose(1, 2)
    flipped = cuda.scan_inference(transposed, pack(projections.transpose(1, 2)), prepared)
    expected = cuda.scan_inference(
        transposed.contiguous(), pack(projections.transpose(1, 2).contiguous()), prepared
    )
    assert torch.equal(flipped, expected)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_packed_projections(rank: int) -> None:
    weight = torch.arange(4 * (rank + 32) * 2.0).view(4, rank + 32, 2)
    packed = cuda.pack_projection(weight)
    assert packed.shape == (128 + -(-4 * rank // 8) * 8, 2)
    for k in range(4):
        assert torch.equal(packed[32 * k : 32 * k + 32], weight[k, rank:])
        at = 128 + k * rank
        assert torch.equal(packed[at : at + rank], weight[k, :rank])
    assert not packed[128 + 4 * rank :].any()


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


@pytest.mark.parametrize("batch", [1, 300], ids=["in chunks", "whole"])
@pytest.mark.parametrize("d", [24, 20], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("shape", [(14, 14), (28, 28)], ids=["shared", "global"])
def test_what_float16_cannot_hold_becomes_its_largest(
    shape: tuple[int, int], d: int, batch: int
) -> None:
    x, projections, *weights, skip = make(batch, shape, d, 1, torch.float16)
    weights += [skip.sign() * 1e5]
    expected = reference.selective_scan_2d(x, projections, *weights)
    assert int((expected.abs() == 65504).sum()) > 100
    trained = cuda.forward(x, projections, *weights, keep=True)[0]
    found = cuda.scan_inference(x, pack(projections), cuda.ScanWeights.of(*weights))
    for y in (trained, found):
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=0.5)


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
