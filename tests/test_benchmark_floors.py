"""The floors, against figures that were worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mambamic import create_model
from mambamic.benchmark.floors import Rates, Work, count, measure
from mambamic.benchmark.timing import Timing

# An H200: 132 multiprocessors at 1.98 GHz.
H200 = Rates(copied_bytes=4.3e12, exponentials=16 * 132 * 1.98e9, flops=7e14)
CPU = torch.device("cpu")


def test_scan_floors() -> None:
    found = H200.scan_floors_ms((128, 4, 96, 3136), 3, 2, backward=False)
    assert found["exponentials"] == pytest.approx(0.59, abs=0.005)
    values = 128 * 3136 * (96 + 96 + 4 * 35)
    assert found["bytes"] == pytest.approx(values * 2 / 4.3e12 * 1e3)
    back = H200.scan_floors_ms((128, 4, 96, 3136), 3, 2, backward=True)
    assert back["exponentials"] == found["exponentials"]
    values = 128 * 3136 * (3 * 96 + 2 * 4 * 35)
    assert back["bytes"] == pytest.approx(values * 2 / 4.3e12 * 1e3)


def test_a_cpu_has_no_special_function_units() -> None:
    cpu = Rates(copied_bytes=2e10, exponentials=None, flops=3e11)
    assert set(cpu.scan_floors_ms((1, 4, 96, 49), 3, 4, backward=False)) == {"bytes"}
    assert cpu.network_floor_ms(Work(flops=3 * 10**9, state_updates=10**9), 2) == pytest.approx(20)


def test_network_floors() -> None:
    work = Work(flops=7 * 10**9, state_updates=81_900_000)
    assert H200.network_floor_ms(work, 1) == pytest.approx(0.01 + 0.01958, abs=1e-4)
    assert H200.network_floor_ms(work, 100) == pytest.approx(100 * (0.01 + 0.01958), abs=1e-2)
    training = H200.network_floor_ms(work, 1, training=True)
    assert training == pytest.approx(0.03 + 2 * 0.01958, abs=1e-4)


@pytest.mark.parametrize("variant", ["mambamic_t", "medmamba_t"])
def test_what_a_network_does(variant: str) -> None:
    model = create_model(variant, 8).eval()
    work = count(model, torch.zeros(1, 3, 224, 224))
    # Per block: 4 directions, 16 states, in all as many channels as the stage has.
    blocks = ((2, 96, 56), (2, 192, 28), (4, 384, 14), (2, 768, 7))
    assert work.state_updates == sum(n * 64 * dim * side**2 for n, dim, side in blocks)
    # The heads alone do 2 * 768 * 8; the networks are known to take about 1 to 5 GFLOP.
    assert 5e8 < work.flops < 1e10


def test_flops_are_counted_twice_per_multiplication() -> None:
    layer = torch.nn.Conv2d(3, 5, 1, bias=False)
    assert count(layer, torch.zeros(1, 3, 4, 4)) == Work(2 * 3 * 5 * 16, 0)


def test_measured_rates_of_a_cpu() -> None:
    rates = measure(CPU, torch.float32, Timing(warmup=1, repeats=3))
    assert rates.exponentials is None
    assert 1e8 < rates.copied_bytes < 1e13
    assert 1e8 < rates.flops < 1e14


@pytest.mark.gpu
def test_measured_rates_of_a_gpu() -> None:
    rates = measure(torch.device("cuda", 0), torch.float16, Timing(warmup=2, repeats=5))
    assert rates.exponentials is not None
    assert 1e11 < rates.exponentials < 1e14
    assert 1e11 < rates.copied_bytes < 1e14
    assert 1e12 < rates.flops < 1e16
