"""Lists of steps for the native library, and the memory that they work on.

``kernels/native/graph.h`` says what each step does with its fields.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mambamic.kernels import cpu


class Kind(IntEnum):
    """``enum kind`` of graph.h."""

    PIXELS = 0
    PRODUCT = 1
    CONVOLUTION = 2
    DEPTHWISE = 3
    LAYER_NORM = 4
    MERGE_NORM = 5
    SCAN = 6
    GROUP_SCAN = 7
    GATE = 8
    RECOMBINE = 9
    INTERACT = 10
    ATTENTION = 11
    MEAN = 12
    INTERLEAVE = 13


class Activation(IntEnum):
    """``enum activation`` of graph.h."""

    NONE = 0
    RELU = 1
    GELU = 2
    SILU = 3


_POINTERS = (
    *("input", "other", "third", "weight", "bias", "scale", "shift"),
    *("out", "scale_out", "sums", "index", "order", "scan"),
)
_SIZES = (
    *("kind", "waits", "batch", "height", "width", "in_height", "in_width", "channels", "columns"),
    *("in_pitch", "out_pitch", "third_pitch", "scale_pitch"),
    *("groups", "in_group", "out_group", "transposed"),
    *("kernel", "stride", "padding", "multiplier", "edges", "activation"),
    *("panels", "half"),
)


class Step(ctypes.Structure):
    """``struct step`` of graph.h, field by field; its ``in`` is ``input`` here."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("factor", ctypes.c_float),
    ]


class Program:
    """A list of steps and all memory that they work on, for one shape of input.

    It can run once at a time.

    Args:
        level: The instruction set for which the weights are packed.
    """

    def __init__(self, level: str) -> None:
        self._level = level
        self._steps: list[Step] = []
        self._kept: list[Any] = []
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Return uninitialised memory; the same for the same name, as far as it is large enough."""
        count = 1
        for size in shape:
            count *= size
        if name not in self._buffers or self._buffers[name].numel() < count:
            self._buffers[name] = torch.empty(count)
            self._kept.append(self._buffers[name])
        return self._buffers[name][:count].view(shape)

    def add(
        self,
        kind: Kind,
        shape: Sequence[int],
        *,
        waits: bool = True,
        **fields: Tensor | float | None,
    ) -> None:
        """Append a step.

        Args:
            kind: What it does.
            shape: (B, H, W), and possibly more.
            waits: Whether it needs what earlier steps since the last waiting one write.
            **fields: The others of ``Step``; a tensor stands for its address.
        """
        batch, height, width = shape[:3]
        step = Step(kind=kind, waits=waits, batch=batch, height=height, width=width)
        for name, value in ({"groups": 1, "multiplier": 1} | fields).items():
            if isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr()
            setattr(step, name, value)
        self._steps.append(step)

    def scan(self, batch: int, height: int, width: int, groups: int, **tensors: Tensor) -> int:
        """Return the address of a scan of ``groups`` groups of channels, for a step's ``scan``.

        Args:
            batch: B.
            height: H.
            width: W.
            groups: Groups of channels that share all parameters.
            **tensors: As in native/scan2d.h, the projections paired.
        """
        _, states, channels = tensors["A"].shape
        scan = cpu.Scan(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            batch=batch,
            height=height,
            width=width,
            groups=groups,
            channels=channels,
            rank=tensors["dt_weight"].shape[1],
            states=states,
            paired=1,
        )
        self._kept += [scan, *tensors.values()]
        return ctypes.addressof(scan)

    def seal(self) -> Step:
        """End the list, and return its first step, whose fields may still be set."""
        self._array = (Step * len(self._steps))(*self._steps)
        return self._array[0]

    def run(self, first: int = 0) -> None:
        """Run all steps of a sealed list from the ``first``, on torch's threads."""
        size = ctypes.sizeof(Step)
        steps = ctypes.byref(self._array, first * size)
        cpu.run_steps(steps, len(self._array) - first, size, self._level)
