"""The clocks: by the host's for what ends on the host, by the device's for kernels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """How often something is run.

    Args:
        warmup: Runs that are not counted.
        repeats: Runs that are.
    """

    warmup: int = 5
    repeats: int = 20


def percentile(times: Sequence[float], share: float) -> float:
    """Return the smallest time that at least this share of the runs kept.

    Args:
        times: Of any order and unit.
        share: From 0 to 1.
    """
    return sorted(times)[max(0, math.ceil(share * len(times)) - 1)]


def host_ms(work: Callable[[], object], timing: Timing) -> list[float]:
    """Return milliseconds per call of work that is finished when it returns."""
    times = []
    for run in range(timing.warmup + timing.repeats):
        begun = time.perf_counter()
        work()
        if run >= timing.warmup:
            times.append((time.perf_counter() - begun) * 1e3)
    return times


def device_ms(work: Callable[[], object], timing: Timing, device: torch.device) -> list[float]:
    """Return milliseconds per call by the device's own clock; by the host's on a CPU."""
    if device.type != "cuda":
        return host_ms(work, timing)
    times = []
    for run in range(timing.warmup + timing.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if run >= timing.warmup:
            times.append(start.elapsed_time(end))
    return times


def captured(
    prepare: Callable[[], Sequence[Callable[[], object]]], device: torch.device
) -> tuple[Callable[[], object], int]:
    """Return a round of calls as one CUDA graph, so that launching takes no time; as is on a CPU.

    Args:
        prepare: Makes the calls of a round, on the stream on which they are captured: a backward
            pass runs on the stream of its forward pass.
        device: Where the calls work.

    Returns:
        The round, and how many calls it holds.
    """
    if device.type != "cuda":
        calls = prepare()
        return lambda: [call() for call in calls], len(calls)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        calls = prepare()
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay, len(calls)
