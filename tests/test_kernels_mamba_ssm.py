"""The adapter to mamba_ssm's scan: its layouts anywhere, the real package on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.errors import BackendError
from mambamic.kernels import mamba_ssm, reference, resolve, scan, selective_scan_2d
from tests.test_kernels_cuda import GRADIENT_TOLERANCE, SHAPES, TOLERANCE, error, make

NAMES = ("x", "projections", "dt_weight", "dt_bias", "A", "skip")


@pytest.fixture
def package() -> None:
    """Skip, with what to install, where the real package is not there."""
    reason = mamba_ssm.unavailable()
    if reason is not None:
        pytest.skip(reason)


def test_to_image_undoes_the_cross_scan() -> None:
    image = torch.arange(2 * 3 * 5 * 4 * 2.0).view(2, 3, 5, 4, 2)
    assert torch.equal(mamba_ssm.to_image(reference.cross_scan(image), 3, 5), image)


def test_to_image_and_a_sum_are_the_cross_merge() -> None:
    sequences = torch.randn(2, 4, 15, 3, dtype=torch.float64)
    merged = mamba_ssm.to_image(sequences, 3, 5).sum(3)
    torch.testing.assert_close(merged, reference.cross_merge(sequences, 3, 5))


def forward_as_defined(*arguments: Any) -> list[Tensor]:
    """What ``selective_scan_cuda.fwd`` computes; (B, K D, L) and, of B and C, (B, K, N, L)."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = arguments
    assert z is None
    assert delta_softplus
    each = u.shape[1] // B.shape[1]
    delta = F.softplus(delta + delta_bias[:, None])
    B, C = (tensor.repeat_interleave(each, 1) for tensor in (B, C))
    state, outputs = torch.zeros(*u.shape[:2], A.shape[1]), []
    for step in range(u.shape[2]):
        now = delta[..., step, None]
        state = torch.exp(now * A) * state + now * B[..., step] * u[..., step, None]
        outputs.append((state * C[..., step]).sum(-1) + D * u[..., step])
    return [torch.stack(outputs, -1), torch.zeros(*u.shape[:2], 1, 2 * A.shape[1])]


def backward_as_defined(*arguments: Any) -> tuple[Tensor, ...]:
    """What ``selective_scan_cuda.bwd`` computes."""
    u, delta, A, B, C, D, z, delta_bias, grad, _states, _out, _dz, softplus, _again = arguments
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
        y, _ = forward_as_defined(*leaves[:6], z, leaves[6], softplus)
        return torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 13)], ids=str)
def test_what_it_hands_over(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, projections and gradients, with the definition in the compiled module's place."""
    module = SimpleNamespace(fwd=forward_as_defined, bwd=backward_as_defined)
    monkeypatch.setattr(mamba_ssm, "_kernel", lambda: module)
    torch.manual_seed(0)
    decay = -torch.rand(4, 6, 16) * torch.arange(1.0, 17)
    sizes = (3, *shape, 6), (3, *shape, 4, 2 + 32), (4, 6, 2), (4, 6), (4, 6)
    x, projections, dt_weight, dt_bias, skip = (torch.randn(size) for size in sizes)
    inputs = (x, projections, dt_weight, dt_bias, decay, skip)
    exact = [t.double().requires_grad_() for t in inputs]
    expected, arriving = reference.selective_scan_2d(*exact), torch.randn_like(x)
    grads = torch.autograd.grad(expected, exact, arriving.double())

    found, states = mamba_ssm.forward(*inputs, keep=True)
    assert states.shape == mamba_ssm.states_shape(x, decay)
    assert found.is_contiguous()
    assert error(found, expected) < 1e-5
    back = mamba_ssm.backward(arriving, *inputs, states)
    for name, grad, right in zip(NAMES, back, grads, strict=True):
        assert grad.is_contiguous(), name
        assert error(grad, right) < 1e-5, name


def test_it_is_for_gpus() -> None:
    with pytest.raises(BackendError) as caught:
        resolve("mamba_ssm", torch.device("cpu"))
    reason = mamba_ssm.unavailable()
    expected = "expected device 'cuda'" if reason is None else reason
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "the optional package mamba_ssm is not installed: MAMBA_KEEP_CUDA_BUILD=TRUE"),
        ({"mamba_ssm/__init__.py": ""}, "mamba_ssm was built without its Mamba-1 scan"),
        (
            {"selective_scan_cuda.so": "not a library"},
            "mamba_ssm was built for another torch (",
        ),
    ],
    ids=["absent", "without the scan", "does not load"],
)
def test_what_is_wrong_with_an_installation(
    files: dict[str, str], reason: str, tmp_path: Path, root: Path
) -> None:
    """Processes whose path holds such an installation and no other."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    hidden = "mamba_ssm", "selective_scan_cuda"
    code = (
        "import importlib.machinery as m, sys, torch\n"
        "from mambamic.kernels import mamba_ssm\n"
        "find = m.PathFinder.find_spec\n"
        f"ours = lambda name, path=None, target=None: find(name, [{str(tmp_path)!r}])"
        f" if name in {hidden!r} else find(name, path, target)\n"
        "sys.meta_path = [type('Finder', (), {'find_spec': staticmethod(ours)})"
        " if f is m.PathFinder else f for f in sys.meta_path]\n"
        "print(mamba_ssm._missing())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(reason)
    assert "'mambamic[mamba-ssm]'" in done.stdout


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
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
    grads = torch.autograd.grad(expected, exact, weight.double())
    assert error(selective_scan_2d(*inputs, backend="mamba_ssm"), expected) < TOLERANCE[dtype]

    tracked = [t.requires_grad_() for t in inputs]
    y = selective_scan_2d(*tracked, backend="mamba_ssm")
    assert y.dtype == dtype
    y.backward(weight)
    for name, got, want in zip(NAMES, tracked, grads, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == got.dtype
        assert error(got.grad, want) < GRADIENT_TOLERANCE[dtype], name


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
def test_it_agrees_with_our_own_kernel_which_stays_the_automatic_one() -> None:
    assert resolve("auto", torch.device("cuda", 0)) == "cuda"
    inputs = make(4, (28, 28), 192, 6, torch.float32)
    theirs = selective_scan_2d(*inputs, backend="mamba_ssm")
    assert error(theirs, selective_scan_2d(*inputs).double()) < 2 * TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("tracked", [False, True], ids=["inference", "training"])
def test_the_operators_keep_what_they_promise(tracked: bool) -> None:
    tensors = [t.requires_grad_(tracked) for t in make(2, (3, 5), 8, 2, torch.float32)]
    torch.library.opcheck(scan._scan, (*tensors, "mamba_ssm", tracked))
    if not tracked:
        y, states = scan._scan(*tensors, "mamba_ssm", True)
        arguments = (torch.ones_like(y), *tensors, states, "mamba_ssm")
        torch.library.opcheck(scan._scan_backward, arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
def test_an_empty_batch() -> None:
    inputs = [t.requires_grad_() for t in make(0, (3, 5), 8, 2, torch.float16)]
    y = selective_scan_2d(*inputs, backend="mamba_ssm")
    assert y.shape == inputs[0].shape
    y.sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("package")
def test_autocast_does_not_reach_inside() -> None:
    inputs = make(2, (14, 14), 48, 3, torch.float32)
    expected = selective_scan_2d(*inputs, backend="mamba_ssm")
    with torch.autocast("cuda", dtype=torch.float16):
        found: Tensor = selective_scan_2d(*inputs, backend="mamba_ssm")
    assert torch.equal(found, expected)
