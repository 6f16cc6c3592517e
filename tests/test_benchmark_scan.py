"""The scan alone."""

from __future__ import annotations

import pytest
import torch

from mambamic.benchmark import scan
from mambamic.benchmark.timing import Timing
from mambamic.kernels import selective_scan_2d
from mambamic.models.registry import VARIANTS

CPU = torch.device("cpu")


def test_the_shapes_are_those_of_the_networks() -> None:
    for family, shapes in scan.SHAPES.items():
        dims = VARIANTS[f"{family}_t"].dims
        for (chunks, side, d_inner, rank), dim, expected in zip(
            shapes, dims, (56, 28, 14, 7), strict=True
        ):
            assert chunks * d_inner == dim
            assert side == expected
            assert rank == -(-d_inner // 2 // 16)


def test_inputs_fit_the_scan() -> None:
    inputs = scan.make_inputs(2, 7, 24, 1, CPU, torch.bfloat16)
    assert [tensor.dtype for tensor in inputs] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert selective_scan_2d(*inputs).shape == (2, 7, 7, 24)


def test_on_a_cpu() -> None:
    row = scan.measure((4, 7, 24, 2), 2, "cpu", CPU, torch.float32, Timing(1, 2))
    assert row["shape"] == [8, 4, 24, 49]
    assert row["dt_rank"] == 2
    assert row["forward_ms"] > 0
    assert row["backward_ms"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_on_a_gpu_the_tensors_do_not_stay_in_its_cache(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    shape = (8, 14, 96, 3)
    sets = scan.sets_past_the_caches(shape, device, dtype)
    x, projections, *_ = scan.make_inputs(*shape, device, dtype)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    assert sets * (x.nbytes + projections.nbytes) >= 2 * cache
    inputs = scan.make_inputs(*shape, device, dtype)
    assert scan.forward_call(inputs, "cuda")().shape == x.shape
    row = scan.measure(shape, 1, "cuda", device, dtype, Timing(1, 2))
    assert 0 < row["forward_ms"] < row["backward_ms"]
