"""The GPU backend of the scan, forward: sizes, limits and launches of ``native/cuda``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mambamic.errors import BackendError
from mambamic.kernels import nvrtc

TILE = 16  # positions between two stored states; the kernel's constant of the same name
_N_DIRECTIONS = 4
_D_STATE = 16
_CAPABILITY = (8, 0)  # asynchronous copies, TF32 on tensor cores
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
REGISTERS = 128  # per thread: enough not to spill, few enough for 16 warps on a multiprocessor
_PARTS = ("walk", "memory", "steps", "stage")
_SOURCES = ("common.cuh", *(f"scan_{part}.cuh" for part in _PARTS), "forward.cu")
_JOIN_SOURCES = ("common.cuh", "scan_merge.cu")
# The kernel's modes. Small images are merged in shared memory, which this many positions fill.
_MERGE_GLOBAL, _MERGE_SHARED, _SUMMARISE, _RESCAN = range(4)
_SHARED_POSITIONS = 256
_FEWEST_CHUNKS = 4  # fewer are not worth a second pass


@dataclass(frozen=True)
class Sizes:
    """What the problem's tensors have as dimensions."""

    batch: int
    height: int
    width: int
    d_inner: int
    d_state: int
    rank: int
    stack: int = 1  # scans that lie side by side at each place

    @property
    def image(self) -> tuple[int, int, int, int]:
        """What every kernel takes at the end of its arguments."""
        return self.batch, self.height, self.width, self.d_inner

    @property
    def tiles(self) -> int:
        """How many tiles a sequence has."""
        return -(-self.height * self.width // TILE)


@dataclass(frozen=True)
class ScanWeights:
    """A scan's parameters as the kernel reads them; made by ``of``.

    Args:
        dt_weight: (K, D, R), as the others contiguous float32.
        dt_bias: (K, D).
        A: (K, D, N), negative.
        skip: (K, D).
    """

    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    skip: Tensor

    @classmethod
    def of(cls, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, skip: Tensor) -> ScanWeights:
        """Return the parameters prepared, to be used many times."""
        return cls(*prepare(dt_weight, dt_bias, A, skip))


@dataclass(frozen=True)
class _Plan:
    """How a problem is spread over the chip."""

    channels: int  # per warp
    groups: int  # of channels
    chunk_tiles: int
    chunks: int


def unavailable() -> str | None:
    """Return why this backend cannot be used here and how to get it, or None when it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built is None:
            return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
        return f"torch (CUDA {built}) finds no NVIDIA GPU: check the driver with nvidia-smi"
    newest = max(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if newest < _CAPABILITY:
        return (
            f"the GPU has compute capability {newest[0]}.{newest[1]}, its kernels need "
            f'{_CAPABILITY[0]}.{_CAPABILITY[1]} (Ampere or newer): use device="cpu"'
        )
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
    batch, height, width, *stack, d_inner = x.shape
    sizes = Sizes(batch, height, width, d_inner, A.shape[-1], dt_weight.shape[-1], *stack)
    if sizes.d_state != _D_STATE or sizes.rank > 32:
        raise BackendError(
            f"d_state {sizes.d_state} with dt_rank {sizes.rank}",
            "a d_state of 16 and a dt_rank of at most 32",
            'ask for backend="reference"',
        )
    # Within an image the kernel indexes with 32 bits, between images with 64.
    values = sizes.stack * max(sizes.d_inner, _N_DIRECTIONS * (sizes.rank + 2 * sizes.d_state))
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
    """Scan; shapes as in ``reference.selective_scan_2d``, or stacked as in ``scan_inference``.

    Returns:
        y in the shape and dtype of ``x``, and the states at the start of every tile of 16
        positions, (B, K, tiles, D, N) in float32, empty unless ``keep``.
    """
    sizes = check(x, projections, dt_weight, A)
    weights = ScanWeights.of(dt_weight, dt_bias, A, skip)
    states = x.new_empty(states_shape(x, A) if keep else (0,), dtype=torch.float32)
    return _scan(x, projections, weights, sizes, states), states


def scan_inference(x: Tensor, projections: Tensor, weights: ScanWeights) -> Tensor:
    """Scan with parameters that are prepared already, without keeping states.

    Args:
        x: (B, H, W, D), or (B, H, W, G, D): G scans with the same weights side by side. From place
            to place there may be more than those values, but one and the same number.
        projections: (B, H, W, P) or (B, H, W, G, P), what ``pack_projection``'s weight gives, in
            the dtype of ``x``.
        weights: Made by ``ScanWeights.of``.

    Returns:
        y in the shape and dtype of ``x``, contiguous.
    """
    sizes = check(x, projections, weights.dt_weight, weights.A)
    nothing = x.new_empty(0, dtype=torch.float32)
    return _scan(x, projections, weights, sizes, nothing, packed=True)


def pack_projection(x_proj_weight: Tensor) -> Tensor:
    """Reorder the input projection's rows for ``scan_inference``.

    Args:
        x_proj_weight: (K, R + 2 N, D), rows dt, B, C.

    Returns:
        (P, D): B and C of each direction, then dt of each, then zeros up to a multiple of 8.
    """
    rank = x_proj_weight.shape[1] - 2 * _D_STATE
    steps, states = x_proj_weight.split([rank, 2 * _D_STATE], dim=1)
    packed = torch.cat([states.flatten(0, 1), steps.flatten(0, 1)])
    return torch.nn.functional.pad(packed, (0, 0, 0, -len(packed) % 8))


def states_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states that ``forward`` keeps for ``backward``."""
    batch, height, width, *stack, d_inner = x.shape
    images = batch * stack[0] if stack else batch
    return images, _N_DIRECTIONS, -(-height * width // TILE), d_inner, A.shape[-1]


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _plan(sizes: Sizes, device: int, keep: bool) -> _Plan:
    # Channels that a warp takes beyond those that there are go to waste.
    channels = min((32, 24), key=lambda n: -(-sizes.d_inner // n) * n)
    groups = -(-sizes.d_inner // channels)
    blocks, available = sizes.batch * sizes.stack * groups, _multiprocessors(device)
    chunk_tiles = sizes.tiles
    if not keep and 2 * blocks <= available and sizes.tiles > 2 * _FEWEST_CHUNKS:
        # About two blocks of four warps to a multiprocessor, as its latencies overlap then.
        shortest = -(-sizes.tiles * blocks // (2 * available))
        if shortest * _FEWEST_CHUNKS <= sizes.tiles:
            chunk_tiles = shortest
    return _Plan(channels, groups, chunk_tiles, -(-sizes.tiles // chunk_tiles))


def _warp_bytes(sizes: Sizes, elem: int, channels: int, mode: int, packed: bool) -> int:
    """Return the size of the kernel's ``Warp``."""
    row = sizes.rank if packed else sizes.rank + 2 * sizes.d_state
    words = (row * elem + 2) // 4 | 1
    x_stride = channels if channels == 24 else channels + 16 // elem
    sum_stride = 24 if channels == 24 else 40
    per_position = 4 * 2 * sizes.d_state + 4 * 2 * channels + elem * x_stride + 4 * words
    if mode == _MERGE_GLOBAL:
        per_position += 4 * sum_stride
    if packed:
        per_position += elem * 2 * sizes.d_state
    weights = -(-sizes.rank // 8) * channels // 8 * 32 * 8
    return TILE * per_position + channels // 2 * 16 + weights


def _place_stride(x: Tensor) -> int | None:
    """Return how far apart the places of an image are, or None where that is not one number."""
    expected = 1
    for dim in range(x.ndim - 1, 2, -1):
        if x.shape[dim] > 1 and x.stride(dim) != expected:
            return None
        expected *= x.shape[dim]
    places = [(x.shape[dim], x.stride(dim)) for dim in (2, 1, 0)]
    stride = next((step for size, step in places if size > 1), expected)
    expected = stride
    for size, step in places:
        if size > 1 and step != expected:
            return None
        expected *= size
    return stride


def _scan(
    x: Tensor,
    projections: Tensor,
    weights: ScanWeights,
    sizes: Sizes,
    states: Tensor,
    *,
    packed: bool = False,
) -> Tensor:
    stride = _place_stride(x)
    if stride is None:
        x, stride = x.contiguous(), sizes.stack * sizes.d_inner
    projections = projections.contiguous()
    if projections.data_ptr() % 16:
        projections = projections.clone()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    device = x.get_device()
    keep = states.numel() > 0
    plan = _plan(sizes, device, keep)
    images, positions = sizes.batch * sizes.stack, sizes.height * sizes.width
    aligned = sizes.d_inner % 8 == 0 and x.data_ptr() % 16 == 0
    sized = {"DTYPE": DTYPES[x.dtype], "D_STATE": sizes.d_state, "DT_RANK": sizes.rank}
    macros = {
        **sized,
        "CHANNELS": plan.channels,
        "REGISTERS": REGISTERS,
        "KEEP": int(keep),
        "ALIGNED": int(aligned and stride * x.element_size() % 16 == 0),
        "PACKED": int(packed),
    }

    def launch(mode: int, partial: Tensor, states: Tensor, sums: Tensor) -> None:
        warp_bytes = _warp_bytes(sizes, x.element_size(), plan.channels, mode, packed)
        map_bytes = positions * plan.channels * 4 if mode == _MERGE_SHARED else 0
        nvrtc.launch(
            _SOURCES,
            "scan_forward",
            {**macros, "MODE": mode, "WARP_BYTES": warp_bytes},
            (images * plan.groups * plan.chunks,),
            32 * _N_DIRECTIONS,
            *(x, projections, weights.dt_weight, weights.dt_bias, weights.A, weights.skip),
            *(y, partial, states, sums, images, sizes.height, sizes.width, sizes.d_inner),
            *(stride, sizes.stack, plan.groups, plan.chunk_tiles),
            shared_bytes=_N_DIRECTIONS * warp_bytes + map_bytes,
        )

    nothing = x.new_empty(0, dtype=torch.float32)
    if plan.chunks > 1:
        per_chunk = (images, _N_DIRECTIONS, plan.chunks, sizes.d_inner)
        ends = x.new_empty((*per_chunk, sizes.d_state), dtype=torch.float32)
        sums = x.new_empty(per_chunk, dtype=torch.float32)
        partial = x.new_empty((_N_DIRECTIONS, *x.shape), dtype=torch.float32)
        starts = torch.empty_like(ends)
        values = ends.numel() // plan.chunks
        launch(_SUMMARISE, nothing, ends, sums)
        nvrtc.launch(
            _JOIN_SOURCES,
            "scan_starts",
            sized,
            (-(-values // 256),),
            256,
            *(weights.A, ends, sums, starts, values, plan.chunks, sizes.d_inner),
        )
        launch(_RESCAN, partial, starts, sums)
        nvrtc.launch(
            _JOIN_SOURCES,
            "scan_merge",
            sized,
            (-(-x.numel() // 256),),
            256,
            *(x, weights.skip, partial, y, x.numel(), sizes.d_inner, sizes.stack, stride),
        )
    elif positions <= _SHARED_POSITIONS:
        launch(_MERGE_SHARED, nothing, states, nothing)
    else:
        partial = y if y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
        launch(_MERGE_GLOBAL, partial, states, nothing)
    return y
