"""Compiling and launching CUDA C++ at run time."""

from __future__ import annotations

import pytest
import torch

from mambamic.kernels import cuda_layers, nvrtc, reference, selective_scan_2d

from .test_kernels_cuda import make

pytestmark = pytest.mark.gpu


def test_launches_may_ask_for_more_and_for_less_shared_memory() -> None:
    """The sums of an image lie in shared memory, as many as it has places."""
    for side in (16, 7, 16):
        inputs = make(2, (side, side), 64, 3, torch.float32)
        expected = reference.selective_scan_2d(*(tensor.double() for tensor in inputs))
        assert torch.allclose(selective_scan_2d(*inputs).double(), expected, atol=1e-3, rtol=1e-4)


def test_compiling_ahead_launches_nothing() -> None:
    x = torch.randn(1, 3, 3, 40, device="cuda")
    weight, bias = torch.ones(40, device="cuda"), torch.zeros(40, device="cuda")
    before = x.clone()
    nvrtc.compile_ahead(lambda: cuda_layers.norm_(x, weight, bias))
    torch.cuda.synchronize()
    assert torch.equal(x, before)
    cuda_layers.norm_(x, weight, bias)
    assert torch.allclose(x, torch.nn.functional.layer_norm(before, (40,)), atol=1e-5)


def test_an_error_while_recording_is_over_afterwards() -> None:
    def fail() -> None:
        raise KeyError("work")

    with pytest.raises(KeyError):
        nvrtc.compile_ahead(fail)
    x = torch.randn(1, 3, 3, 40, device="cuda")
    before = x.clone()
    cuda_layers.norm_(x, torch.ones(40, device="cuda"), torch.zeros(40, device="cuda"))
    assert not torch.equal(x, before)
