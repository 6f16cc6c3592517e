"""How fast a device could be: what its memory, its exponentials and its matrix units allow.

Three floors. *Bytes*: inputs read once and outputs written once, at the bandwidth at which this
device copies. *Exponentials*: one per state update, on the special-function units alone (a kernel
that takes some of them to polynomials can be faster). *Matrix products*: those of the network's
layers, at the rate of one large product. A whole network's floor is the sum of its scans'
exponentials and its matrix products; nothing else that it does is counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mambamic.benchmark.timing import Timing, device_ms

# Results of the special-function units per clock and multiprocessor, on every GPU since Volta.
_SPECIAL_FUNCTIONS = 16
_N_DIRECTIONS, _D_STATE = 4, 16
_BYTES = "inputs read once and outputs written once, at the measured copy bandwidth"
DEFINITIONS = {
    "cuda": {
        "bytes": _BYTES,
        "exponentials": "one per state update at 16 per clock and multiprocessor",
        "networks": "the scans' exponentials plus the matrix products at the measured rate",
        "training": "two exponentials per state update plus three times the matrix products",
    },
    "cpu": {
        "bytes": _BYTES,
        "networks": "the matrix products at the measured rate, the scans not counted",
        "training": "three times the matrix products, the scans not counted",
    },
}


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do, per second.

    Args:
        copied_bytes: Read and written, both counted.
        exponentials: Of the special-function units; None on a CPU.
        flops: Of a large matrix product, multiplications and additions counted.
    """

    copied_bytes: float
    exponentials: float | None
    flops: float

    def scan_floors_ms(self, shape: tuple[int, int, int, int], rank: int, itemsize: int,
                       *, backward: bool) -> dict[str, float]:  # fmt: skip
        """Return the floors of one scan, merge included, in milliseconds.

        Args:
            shape: (B, K, D, L).
            rank: Of the steps.
            itemsize: Bytes per value of the image and the projections.
            backward: Of the backward pass, which reads the arriving gradient and writes two.
        """
        batch, n_directions, d_inner, length = shape
        positions = batch * length
        projections = positions * n_directions * (rank + 2 * _D_STATE)
        image = positions * d_inner
        values = 3 * image + 2 * projections if backward else 2 * image + projections
        floors = {"bytes": values * itemsize / self.copied_bytes * 1e3}
        if self.exponentials is not None:
            updates = positions * n_directions * d_inner * _D_STATE
            floors["exponentials"] = updates / self.exponentials * 1e3
        return floors

    def network_floor_ms(self, work: Work, images: int, *, training: bool = False) -> float:
        """Return the floor of a whole network in milliseconds."""
        seconds = work.flops / self.flops * (3 if training else 1)
        if self.exponentials is not None:
            seconds += work.state_updates / self.exponentials * (2 if training else 1)
        return seconds * images * 1e3


@dataclass(frozen=True)
class Work:
    """What a network does for one image, forward.

    Args:
        flops: Of convolutions and matrix products.
        state_updates: Of its scans.
    """

    flops: int
    state_updates: int


class _ScanCounter(TorchDispatchMode):
    """Adds up the state updates of the scans that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state_updates = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.mambamic.selective_scan_2d.default:
            x, _, _, _, A = args[:5]
            self.state_updates += x.numel() * A.shape[0] * A.shape[2]
        return func(*args, **(kwargs or {}))


def count(model: torch.nn.Module, image: Tensor) -> Work:
    """Return what a network does for one image.

    Args:
        model: The plain module, in evaluation mode.
        image: (1, 3, H, W).
    """
    with torch.inference_mode(), FlopCounterMode(display=False) as flops, _ScanCounter() as scans:
        model(image)
    return Work(flops.get_total_flops(), scans.state_updates)


def measure(device: torch.device, dtype: torch.dtype, timing: Timing) -> Rates:
    """Measure a device.

    Args:
        device: A CPU, or a GPU.
        dtype: Of the matrix product.
        timing: Of the copy and of the product.
    """
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30) if gpu else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = statistics.median(device_ms(lambda: target.copy_(source), timing, device))
    side = 8192 if gpu else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = statistics.median(device_ms(lambda: left @ right, timing, device))
    return Rates(
        copied_bytes=2 * source.numel() / copying * 1e3,
        exponentials=_special_functions(device) if gpu else None,
        flops=2 * side**3 / product * 1e3,
    )


def _special_functions(device: torch.device) -> float:
    from cuda.core import Device

    properties = Device(device.index or 0).properties
    kilohertz: int = properties.clock_rate
    return float(_SPECIAL_FUNCTIONS * properties.multiprocessor_count * kilohertz * 1000)
