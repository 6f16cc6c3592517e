"""The GPU backend of the scan, forward: sizes, limits and launches of ``native/cuda``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mambamic.errors import BackendError
from mambamic.kernels import nvrtc

TILE = 16  # positions between two stored states; the kernel's constant of the same name
_N_DIRECTIONS = 4
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REGISTERS = 128  # per thread: enough not to spill much, few enough to fill a multiprocessor


@dataclass(frozen=True)
class Sizes:
    """What the problem's tensors have as dimensions."""

    batch: int
    height: int
    width: int
    d_inner: int
    d_state: int
    rank: int

    @property
    def image(self) -> tuple[int, int, int, int]:
        """What every kernel takes at the end of its arguments."""
        return self.batch, self.height, self.width, self.d_inner


def unavailable() -> str | None:
    """Return why this backend cannot be used here and how to get it, or None when it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
        return f"torch (CUDA {built}) finds no NVIDIA GPU: check the driver with nvidia-smi"
    module = nvrtc.missing_module()
    if module is None:
        return None
    major = (torch.version.cuda or "13").split(".")[0]
    return f"{module} is not installed: pip install 'cuda-core[cu{major}]'"


def describe() -> str:
    """Return how the kernel comes about, for humans."""
    return f"compiled by NVRTC (CUDA {torch.version.cuda})"


def check(x: Tensor, projections: Tensor, dt_weight: Tensor, A: Tensor) -> Sizes:
    """Return the sizes of a problem, or raise what is wrong with them."""
    if x.dtype not in DTYPES:
        raise BackendError(
            f"the cuda scan got {x.dtype}",
            "float32, float16 or bfloat16",
            'convert the input, or ask for backend="reference"',
        )
    batch, height, width, d_inner = x.shape
    sizes = Sizes(batch, height, width, d_inner, A.shape[-1], dt_weight.shape[-1])
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


def prepare(*tensors: Tensor) -> tuple[Tensor, ...]:
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
    sizes = check(x, projections, dt_weight, A)
    x, projections = x.contiguous(), projections.contiguous()
    dt_weight, dt_bias, A, skip = prepare(dt_weight, dt_bias, A, skip)
    y = torch.empty_like(x)
    partial = y if y.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
    states = x.new_empty(states_shape(x, A) if keep else (0,), dtype=torch.float32)
    if x.numel() == 0:
        return y, states
    # At least 24 channels, so that four directions of them are enough threads to fetch a tile.
    blocks = -(-sizes.d_inner // 64)
    channels = max(24, -(-sizes.d_inner // (8 * blocks)) * 8)
    macros = {
        "DTYPE": DTYPES[x.dtype],
        "D_STATE": sizes.d_state,
        "DT_RANK": sizes.rank,
        "CHANNELS": channels,
        "REGISTERS": REGISTERS,
        "KEEP": int(keep),
    }
    nvrtc.launch(
        ("common.cuh", "forward.cu"),
        "scan_forward",
        macros,
        (sizes.batch, blocks),
        channels * _N_DIRECTIONS,
        *(x, projections, dt_weight, dt_bias, A, skip, y, partial, states),
        *sizes.image,
    )
    return y, states


def states_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states that ``forward`` keeps for ``backward``."""
    batch, height, width, d_inner = x.shape
    return batch, _N_DIRECTIONS, -(-height * width // TILE), d_inner, A.shape[-1]
