"""The clocks."""

from __future__ import annotations

import time

import pytest
import torch

from mambamic.benchmark.timing import Timing, captured, device_ms, host_ms, percentile

CPU = torch.device("cpu")


def test_warm_up_runs_are_not_counted() -> None:
    naps = iter([0.5, 0.001, 0.001, 0.001])
    times = host_ms(lambda: time.sleep(next(naps)), Timing(warmup=1, repeats=3))
    assert len(times) == 3
    assert min(times) >= 1
    assert max(times) < 400
    assert next(naps, None) is None


def test_percentiles() -> None:
    times = [float(value) for value in range(200, 0, -1)]
    assert percentile(times, 0.5) == 100
    assert percentile(times, 0.99) == 198
    assert percentile(times, 1) == 200
    assert percentile([7.0], 0.99) == 7


def test_a_round_on_a_cpu_makes_every_call() -> None:
    made: list[int] = []
    work, calls = captured(lambda: [lambda: made.append(1), lambda: made.append(2)], CPU)
    assert calls == 2
    assert made == []
    assert len(device_ms(work, Timing(warmup=1, repeats=2), CPU)) == 2
    assert made == [1, 2] * 3


@pytest.mark.gpu
def test_a_captured_round_repeats_the_work_on_the_device() -> None:
    device = torch.device("cuda", 0)
    total = torch.zeros(1, device=device)
    work, calls = captured(lambda: [lambda: total.add_(1), lambda: total.add_(10)], device)
    before = total.item()
    times = device_ms(work, Timing(warmup=1, repeats=2), device)
    assert calls == 2
    assert len(times) == 2
    assert min(times) > 0
    assert total.item() == before + 33


@pytest.mark.gpu
def test_the_devices_clock_counts_the_work_and_not_its_launch() -> None:
    device = torch.device("cuda", 0)
    big = torch.ones(1 << 28, device=device)
    took = device_ms(lambda: big.mul_(1), Timing(2, 5), device)
    # 2 GiB moved: more than a tenth of a millisecond on any GPU, and far less than a second.
    assert all(0.1 < ms < 1000 for ms in took)
