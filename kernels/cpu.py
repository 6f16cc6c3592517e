"""The 2-D selective scan on CPUs, through the native library that is built at installation.

The inference graph's steps run through the same library (``run_steps``, mambamic/graph/cpu.py).

The library has no Python or torch interface of its own: it is loaded with ctypes, which lets
other Python threads run meanwhile. Nothing here is differentiable; ``backward`` is a function of
its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.kernels.reference import narrowed

LEVEL_VARIABLE = "MAMBAMIC_CPU_SIMD"
LEVELS = ("baseline", "avx2", "avx512")
MAX_STATES = 64

_LIBRARY = Path(__file__).with_name("_scan2d.so")
_INTERFACE = 2
_DIRECTIONS = 4
_LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_REBUILD = "run `pip install -e .` in the repository, or reinstall mambamic"

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Scan(ctypes.Structure):
    """``struct scan`` of native/scan2d.h, field by field."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "projections", "dt_weight", "dt_bias", "A", "skip", "grad_y", "y"),
                *("grad_x", "grad_projections", "grad_dt_weight"),
                *("grad_dt_bias", "grad_A", "grad_skip"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch",
                "height",
                "width",
                "groups",
                "channels",
                "rank",
                "states",
                "paired",
            )
        ),
    ]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none."""
    if not _LIBRARY.is_file():
        return f"the native library {_LIBRARY.name} was not built; {_REBUILD}"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        found = library.scan2d_interface()
    except (OSError, AttributeError) as error:
        return f"the native library {_LIBRARY.name} cannot be loaded ({error}); {_REBUILD}"
    if found != _INTERFACE:
        return f"the native library has interface {found} and not {_INTERFACE}; {_REBUILD}"
    return library


@functools.cache
def _openmp() -> ctypes.c_void_p | None:
    """Return the entry to torch's OpenMP threads, by the name that all OpenMP runtimes export."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except AttributeError:
        return None


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        problem, _, remedy = library.partition("; ")
        raise BackendError(f"no CPU kernel: {problem}", "the library beside its sources", remedy)
    return library


def available_levels() -> tuple[str, ...]:
    """Return the instruction sets that the library can use here, slowest first.

    Raises:
        BackendError: The library is missing.
    """
    return LEVELS[: _library().scan2d_best_level() + 1]


def level() -> str:
    """Return the instruction set in use: the best one, or what MAMBAMIC_CPU_SIMD names.

    Raises:
        BackendError: The library is missing, or the processor lacks what the variable names.
    """
    usable = available_levels()
    wanted = os.environ.get(LEVEL_VARIABLE) or usable[-1]
    if wanted not in usable:
        raise BackendError(
            f"{LEVEL_VARIABLE} is {wanted!r}",
            f"one of {', '.join(usable)} on this processor",
            "change or unset the variable",
        )
    return wanted


def lanes(level: str) -> int:
    """Return how many float32 a vector of one of ``LEVELS`` holds."""
    return _LANES[level]


@functools.cache
def _half_available() -> bool:
    return bool(_library().graph_half_available())


def has_bfloat16() -> bool:
    """Return whether an inference graph can multiply bfloat16 matrices, on AMX tiles, here.

    Raises:
        BackendError: As ``level``.
    """
    return level() == LEVELS[-1] and _half_available()


def run_steps(steps: object, count: int, step_bytes: int, level: str) -> None:
    """Run steps of an inference graph, see native/graph.h, on torch's threads.

    Args:
        steps: A pointer to them.
        count: Their number.
        step_bytes: The size of one as the caller lays it out.
        level: The instruction set for which their weights are packed.

    Raises:
        BackendError: The library is missing, or lays steps out differently.
    """
    library = _library()
    if library.graph_step_bytes() != step_bytes:
        raise BackendError(
            "the native library is of another version",
            f"one whose steps take {step_bytes} bytes",
            _REBUILD,
        )
    failed = library.graph_run(
        steps,
        ctypes.c_int64(count),
        LEVELS.index(level),
        _openmp(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("graph_run: no memory for the steps' working space")


def unavailable() -> str | None:
    """Return None where the kernel can be used, else the reason and the remedy in one line."""
    library = _load()
    if isinstance(library, str):
        return library
    try:
        level()
    except BackendError as error:
        return str(error)
    return None


def describe() -> str:
    """Return what is used, such as ``avx512, 2 threads``."""
    threads = torch.get_num_threads()
    return f"{level()}, {threads} thread{'' if threads == 1 else 's'}"


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}", f"{shape}", "see selective_scan_2d"
        )
    if tensor.device.type != "cpu":
        raise UsageError(
            f"{name} is on {tensor.device}", "a CPU tensor", "move it, or use another backend"
        )
    if tensor.dtype not in _DTYPES:
        raise UsageError(
            f"{name} is {tensor.dtype}",
            "float32, float16 or bfloat16 for backend 'cpu'",
            "convert it, or use backend='reference' for float64",
        )


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


class _Call:
    """One checked call: float32 tensors kept alive, and the structure that points at them."""

    def __init__(
        self,
        x: Tensor,
        projections: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        skip: Tensor,
    ) -> None:
        for name, tensor, dimensions in (("x", x, 4), ("dt_weight", dt_weight, 3), ("A", A, 3)):
            if tensor.ndim != dimensions:
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}",
                    f"{dimensions} dimensions",
                    "see selective_scan_2d",
                )
        batch, height, width, channels = x.shape
        rank, states = dt_weight.shape[-1], A.shape[-1]
        if not (height and width and channels and rank and 0 < states <= MAX_STATES):
            raise ShapeError(
                f"x is {tuple(x.shape)} with rank {rank} and {states} states",
                f"no empty dimension but the batch, and at most {MAX_STATES} states",
                "use an image of at least one pixel, or backend='reference'",
            )
        features = rank + 2 * states
        shapes = {
            "x": (batch, height, width, channels),
            "projections": (batch, height, width, _DIRECTIONS, features),
            "dt_weight": (_DIRECTIONS, channels, rank),
            "dt_bias": (_DIRECTIONS, channels),
            "A": (_DIRECTIONS, channels, states),
            "skip": (_DIRECTIONS, channels),
        }
        inputs = (x, projections, dt_weight, dt_bias, A, skip)
        for tensor, (name, shape) in zip(inputs, shapes.items(), strict=True):
            _check(name, tensor, shape)
        self.struct = Scan(
            batch=batch,
            height=height,
            width=width,
            groups=1,
            channels=channels,
            rank=rank,
            states=states,
        )
        self._tensors: list[Tensor] = []
        for name, tensor in zip(shapes, inputs, strict=True):
            # Vectors run across channels.
            by_channel = tensor.transpose(1, 2) if name in ("dt_weight", "A") else tensor
            self.point(name, _dense(by_channel))

    def point(self, name: str, tensor: Tensor) -> Tensor:
        """Set a field of the structure to a dense float32 tensor, which this object keeps."""
        self._tensors.append(tensor)
        setattr(self.struct, name, tensor.data_ptr())
        return tensor

    def run(self, function: str) -> None:
        """Call a function of the library."""
        failed = getattr(_library(), function)(
            ctypes.byref(self.struct),
            LEVELS.index(level()),
            _openmp(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"{function}: no memory for the scan's working space")


def forward(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, skip: Tensor
) -> Tensor:
    """Run the selective scan over an image in four directions and sum the results.

    Args:
        x: (B, H, W, D), float32, float16 or bfloat16; computed in float32.
        projections: (B, H, W, 4, R + 2 N): dt, B, C; N at most 64.
        dt_weight: (4, D, R).
        dt_bias: (4, D).
        A: (4, D, N), negative.
        skip: (4, D).

    Returns:
        (B, H, W, D) in the dtype of ``x``; the same bits for any number of threads.

    Raises:
        BackendError: The library is missing.
        ShapeError: A shape does not fit the others.
        UsageError: A tensor is of another dtype or not on the CPU.
    """
    call = _Call(x, projections, dt_weight, dt_bias, A, skip)
    y = call.point("y", torch.empty(x.shape))
    call.run("scan2d_forward")
    return narrowed(y, x.dtype)


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension one by one: ``sum`` may split it among threads."""
    total = parts[0].clone() if len(parts) else parts.sum(0)
    for part in parts[1:]:
        total += part
    return total


def backward(
    grad_y: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
) -> Gradients:
    """Compute the gradients of :func:`forward`.

    Args:
        grad_y: (B, H, W, D), the gradient of the result.
        x: As given to ``forward``, and so the others.
        projections: (B, H, W, 4, R + 2 N).
        dt_weight: (4, D, R).
        dt_bias: (4, D).
        A: (4, D, N).
        skip: (4, D).

    Returns:
        The gradients of the six inputs, each in the shape and dtype of its input; the same bits
        for any number of threads.

    Raises:
        BackendError: The library is missing.
        ShapeError: A shape does not fit the others.
        UsageError: A tensor is of another dtype or not on the CPU.
    """
    call = _Call(x, projections, dt_weight, dt_bias, A, skip)
    _check("grad_y", grad_y, tuple(x.shape))
    call.point("grad_y", _dense(grad_y))
    batch = x.shape[0]
    by_direction = call.point("grad_x", torch.empty(batch, _DIRECTIONS, *x.shape[1:]))
    of_projections = call.point("grad_projections", torch.empty(projections.shape))
    parameters = {"dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "skip": skip}
    by_image = [
        call.point(f"grad_{name}", torch.empty(batch, *parameter.shape))
        for name, parameter in parameters.items()
    ]
    call.run("scan2d_backward")
    of_dt_weight, of_dt_bias, of_A, of_skip = (
        _sum_in_order(parts).to(parameter.dtype)
        for parts, parameter in zip(by_image, parameters.values(), strict=True)
    )
    of_x = _sum_in_order(by_direction.transpose(0, 1)).to(x.dtype)
    of_projections = of_projections.to(projections.dtype)
    return of_x, of_projections, of_dt_weight, of_dt_bias, of_A, of_skip
