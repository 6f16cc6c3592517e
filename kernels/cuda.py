"""The GPU backend: compiles ``native/cuda`` with NVRTC and launches it on torch's stream.

No compiler is needed on the machine: NVRTC is a library that torch's CUDA wheels bring along,
and NVIDIA's ``cuda-core`` binds it. Each combination of sizes is compiled once, in about a
second, and kept in the user's cache folder.
"""

from __future__ import annotations

import functools
import importlib.util
from ctypes import c_int32
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambamic.errors import BackendError

TILE = 16  # positions between two stored states; the kernel's constant of the same name
_N_DIRECTIONS = 4
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_REGISTERS = 128  # per thread: enough not to spill much, few enough to fill a multiprocessor
_SOURCES = Path(__file__).resolve().parent / "native" / "cuda"


@dataclass(frozen=True)
class _Sizes:
    """What the problem's tensors have as dimensions."""

    batch: int
    height: int
    width: int
    d_inner: int
    d_state: int
    rank: int


def unavailable() -> str | None:
    """Return why this backend cannot be used here and how to get it, or None when it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
        return f"torch (CUDA {built}) finds no NVIDIA GPU: check the driver with nvidia-smi"
    module = _missing_module()
    if module is None:
        return None
    major = (torch.version.cuda or "13").split(".")[0]
    return f"{module} is not installed: pip install 'cuda-core[cu{major}]'"


@functools.cache
def _missing_module() -> str | None:
    """Return what the launch needs and does not find; looked up once, as every scan asks."""
    for module in ("cuda", "cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(module) is None:
            return module
    return None


def describe() -> str:
    """Return how the kernel comes about, for humans."""
    return f"compiled by NVRTC (CUDA {torch.version.cuda})"


@functools.cache
def _program_cache() -> Any | None:
    """Return the on-disk cache of compiled kernels, or None where the folder is not writable."""
    from cuda.core.utils import FileStreamProgramCache

    try:
        return FileStreamProgramCache()
    except OSError:
        return None


@functools.cache
def _kernel(device: int, direction: str, macros: tuple[tuple[str, int], ...]) -> Any:
    """Return one compiled kernel; the first call for a combination takes about a second."""
    from cuda.core import Device, Program, ProgramOptions

    Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    options = ProgramOptions(
        std="c++17",
        arch=f"sm_{major}{minor}",
        define_macro=[(name, str(value)) for name, value in macros],
    )
    files = (_SOURCES / "common.cuh", _SOURCES / f"{direction}.cu")
    program = Program("\n".join(file.read_text() for file in files), "c++", options)
    return program.compile("cubin", cache=_program_cache()).get_kernel(f"scan_{direction}")


def _launch(
    direction: str,
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    tensors: tuple[Tensor, ...],
    sizes: _Sizes,
) -> None:
    from cuda.core import LaunchConfig, Stream, launch

    device = tensors[0].device
    assert device.index is not None  # tensors on a GPU always have one
    with torch.cuda.device(device):
        kernel = _kernel(device.index, direction, tuple(macros.items()))
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        # A pointer goes as a plain Python integer, 64 bits wide; C ints must say their width.
        launch(
            stream,
            LaunchConfig(grid=grid, block=threads),
            kernel,
            *(tensor.data_ptr() for tensor in tensors),
            *map(c_int32, (sizes.batch, sizes.height, sizes.width, sizes.d_inner)),
        )


def _check(x: Tensor, projections: Tensor, dt_weight: Tensor, A: Tensor) -> _Sizes:
    if x.dtype not in _DTYPES:
        raise BackendError(
            f"the cuda scan got {x.dtype}",
            "float32, float16 or bfloat16",
            'convert the input, or ask for backend="reference"',
        )
    batch, height, width, d_inner = x.shape
    sizes = _Sizes(batch, height, width, d_inner, A.shape[-1], dt_weight.shape[-1])
    if sizes.d_state != 16 or sizes.rank > 32:
        raise BackendError(
            f"d_state {sizes.d_state} with dt_rank {sizes.rank}",
            "a d_state of 16 and a dt_rank of at most 32",
            'ask for backend="reference"',
        )
    # Within an image the kernel indexes with 32 bits, between images with 64.
    values = max(sizes.d_inner, _N_DIRECTIONS * (sizes.rank + 2 * sizes.d_state))
    if sizes.height * sizes.width * values >= 2**31:
        raise BackendError(
            f"an image of {sizes.height} x {sizes.width} positions with {values} values each",
            "fewer than 2**31 values",
            "score smaller tiles",
        )
    return sizes


def _prepare(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Make parameters what the kernel reads: contiguous float32."""
    return tuple(tensor.detach().float().contiguous() for tensor in tensors)


def forward(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Scan; shapes as in ``reference.selective_scan_2d``.

    Returns:
        y (B, H, W, D) in the dtype of ``x``, and the states at the start of every tile of 16
        positions, (B, K, tiles, D, N) in float32, empty unless ``keep``.
    """
    sizes = _check(x, projections, dt_weight, A)
    x, projections = x.contiguous(), projections.contiguous()
    dt_weight, dt_bias, A, skip = _prepare(dt_weight, dt_bias, A, skip)
    y = torch.empty_like(x)
    partial = y if y.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    states = x.new_empty(states_shape(x, A) if keep else (0,), dtype=torch.float32)
    if x.numel() == 0:
        return y, states
    # At least 24 channels, so that four directions of them are enough threads to fetch a tile.
    blocks = -(-sizes.d_inner // 64)
    channels = max(24, -(-sizes.d_inner // (8 * blocks)) * 8)
    macros = {
        "DTYPE": _DTYPES[x.dtype],
        "D_STATE": sizes.d_state,
        "DT_RANK": sizes.rank,
        "CHANNELS": channels,
        "REGISTERS": _REGISTERS,
        "KEEP": int(keep),
    }
    _launch(
        "forward",
        macros,
        (sizes.batch, blocks),
        channels * _N_DIRECTIONS,
        (x, projections, dt_weight, dt_bias, A, skip, y, partial, states),
        sizes,
    )
    return y, states


def states_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states that ``forward`` keeps for ``backward``."""
    batch, height, width, d_inner = x.shape
    return batch, _N_DIRECTIONS, -(-height * width // TILE), d_inner, A.shape[-1]


def backward(
    grad_y: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, projections, dt_weight, dt_bias, A and skip.

    Each comes in the dtype of what it belongs to. Sums over images and blocks are taken in a
    fixed order: the result is deterministic.
    """
    sizes = _check(x, projections, dt_weight, A)
    x, projections = x.contiguous(), projections.contiguous()
    grad_y = grad_y.to(x.dtype).contiguous()
    weights = _prepare(dt_weight, dt_bias, A, skip)
    # As many channels in a block as its 48 KiB of shared memory take, spread evenly.
    blocks = -(-sizes.d_inner // (64 if sizes.rank <= 8 else 32))
    channels = -(-sizes.d_inner // (8 * blocks)) * 8
    grad_x = torch.empty_like(x)
    partial = grad_x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    grad_projections = projections.new_empty(
        (blocks, *projections.shape), dtype=torch.float32 if blocks > 1 else projections.dtype
    )
    grads = [x.new_empty((sizes.batch, *w.shape), dtype=torch.float32) for w in weights]
    macros = {
        "DTYPE": _DTYPES[x.dtype],
        "D_STATE": sizes.d_state,
        "DT_RANK": sizes.rank,
        "CHANNELS": channels,
        "REGISTERS": _REGISTERS,
        "SPLIT": int(blocks > 1),
    }
    if x.numel():
        _launch(
            "backward",
            macros,
            (sizes.batch, blocks),
            channels * 4,
            (grad_y, x, projections, *weights, states, grad_x, partial, grad_projections, *grads),
            sizes,
        )
    summed = grad_projections[0] if blocks == 1 else grad_projections.sum(0).to(projections.dtype)
    parameters = (dt_weight, dt_bias, A, skip)
    of_weight, of_bias, of_A, of_skip = (
        grad.sum(0).to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)
    )
    return grad_x, summed, of_weight, of_bias, of_A, of_skip
