"""Runs a function of pixels on a GPU as captured CUDA graphs, with overlapped transfers.

Every batch size that is shown to the device is one of a few (``BUCKETS``), captured when it first
comes. While the device works on one batch, the pixels of the next are on their way to it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambamic.kernels import nvrtc

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_OVERLAP = 2  # batches that are under way at once


def bucketed(count: int, buckets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split a batch into parts of few sizes.

    Args:
        count: Images.
        buckets: The sizes, ascending.

    Yields:
        How many of the images go together, and the size to which they are padded.
    """
    while count:
        size = next((size for size in buckets if size >= count), buckets[-1])
        images = min(count, size)
        yield images, size
        count -= images


@dataclass(frozen=True)
class _Captured:
    """One batch size's graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    result: Tensor


class _Transfer:
    """The memory through which one batch passes on its way to the device and back."""

    def __init__(self, images: int, image: tuple[int, ...], outputs: int, device: torch.device):
        self.host = torch.empty((images, *image), dtype=torch.uint8, pin_memory=True)
        self.pixels = torch.empty((images, *image), dtype=torch.uint8, device=device)
        self.result = torch.empty((images, outputs), dtype=torch.float32, pin_memory=True)
        self.arrived, self.done = torch.cuda.Event(), torch.cuda.Event()
        self.part: slice | None = None  # of the images that are under way

    def collect(self, results: NDArray[np.float32]) -> None:
        """Wait for the batch that is under way, if there is one, and keep its results."""
        if self.part is not None:
            self.done.synchronize()
            results[self.part] = self.result[: self.part.stop - self.part.start].numpy()
            self.part = None


class Replay:
    """A function of pixels, captured once for each batch size and replayed from then on.

    Several threads may call it; they take turns.

    Args:
        function: (B, H, W, 3) uint8 on the device to (B, outputs) float32 there, without
            waiting for the device.
        image: (H, W, 3).
        outputs: Per image.
        device: Of the function.
        max_batch: Larger batches are split.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        image: tuple[int, int, int],
        outputs: int,
        device: torch.device,
        max_batch: int,
    ) -> None:
        self._function, self._image, self._outputs = function, image, outputs
        self._device = device
        self._buckets = [*(size for size in BUCKETS if size < max_batch), max_batch]
        self._captured: dict[int, _Captured] = {}
        self._transfers: list[_Transfer] = []
        self._lock = threading.Lock()
        self._work, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute the function.

        Args:
            pixels: (B, H, W, 3), of any B; pinned memory is read where it lies.

        Returns:
            (B, outputs).

        Raises:
            torch.OutOfMemoryError: The GPU's memory does not suffice; a smaller batch may do.
        """
        results = np.empty((len(pixels), self._outputs), np.float32)
        with self._lock, torch.cuda.device(self._device):
            try:
                self._run(pixels, results)
            except BaseException:
                # Nothing may be under way, in memory that is used again, when the next call comes.
                torch.cuda.synchronize(self._device)
                self._transfers.clear()
                raise
        return results

    def _run(self, pixels: NDArray[np.uint8], results: NDArray[np.float32]) -> None:
        start = 0
        for turn, (images, size) in enumerate(bucketed(len(pixels), self._buckets)):
            captured = self._capture(size)
            transfer = self._transfer(turn % _OVERLAP, images, results)
            part = slice(start, start + images)
            source = _pinned(pixels[part])
            if source is None:
                np.copyto(transfer.host[:images].numpy(), pixels[part])
                source = transfer.host[:images]
            with torch.cuda.stream(self._copies):
                transfer.pixels[:images].copy_(source, non_blocking=True)
                transfer.arrived.record()
            with torch.cuda.stream(self._work):
                transfer.arrived.wait()
                # What is left of an earlier batch fills the bucket.
                captured.pixels[:images].copy_(transfer.pixels[:images], non_blocking=True)
                captured.graph.replay()
                transfer.result[:images].copy_(captured.result[:images], non_blocking=True)
                transfer.done.record()
            transfer.part = part
            start += images
        for transfer in self._transfers:
            transfer.collect(results)

    def _transfer(self, turn: int, images: int, results: NDArray[np.float32]) -> _Transfer:
        """Return memory for so many images, free of what was under way in it."""
        while len(self._transfers) <= turn:
            self._transfers.append(_Transfer(0, self._image, self._outputs, self._device))
        self._transfers[turn].collect(results)
        if len(self._transfers[turn].host) < images:
            size = next(size for size in self._buckets if size >= images)
            self._transfers[turn] = _Transfer(size, self._image, self._outputs, self._device)
        return self._transfers[turn]

    def _capture(self, size: int) -> _Captured:
        if size not in self._captured:
            pixels = torch.zeros((size, *self._image), dtype=torch.uint8, device=self._device)
            self._work.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._work):
                nvrtc.compile_ahead(lambda: self._function(pixels))
                self._function(pixels)  # libraries prepare themselves at a first call
            self._work.synchronize()
            torch.cuda.empty_cache()  # the graph's memory is its own
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with (
                _no_collection(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._work, capture_error_mode="thread_local"
                ),
            ):
                result = self._function(pixels)
            self._captured[size] = _Captured(graph, pixels, result)
        return self._captured[size]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing another graph's memory: that ends a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _pinned(pixels: NDArray[np.uint8]) -> Tensor | None:
    if not (pixels.flags.c_contiguous and pixels.flags.writeable):
        return None
    tensor = torch.from_numpy(pixels)
    return tensor if tensor.is_pinned() else None
