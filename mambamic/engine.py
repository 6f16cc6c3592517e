"""What computes for a ``Classifier`` with torch: the network on a device, fused where it can be."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambamic import kernels
from mambamic.checkpoint import Checkpoint
from mambamic.errors import BackendError, UsageError
from mambamic.graph.cpu import CpuGraph
from mambamic.graph.fold import inverse
from mambamic.graph.gpu import GpuGraph, opening_libraries
from mambamic.graph.plain import forward
from mambamic.graph.replay import Replay
from mambamic.kernels import cpu, nvrtc
from mambamic.models import create_model, load_exactly, set_scan_backend
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba
from mambamic.preprocess import Pixels

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_Network = Callable[[Tensor], tuple[Tensor, Tensor]]
_MAX_BATCH = {"cpu": 32, "cuda": 256}
_WARM_UP = (1, 2, 4, 8, 16, 32)  # the batches of a server; larger ones are bulk work and can wait


class TorchEngine:
    """A checkpoint's network on a device.

    Args:
        checkpoint: With weights.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: Of the scan.
        dtype: ``auto`` or a name in ``TORCH_DTYPES``.
        max_batch: Larger batches are split; None for what suits the device.

    Raises:
        CheckpointError: The weights do not fit the config.
        BackendError: The device or the backend is not available here.
        UsageError: A name that does not exist.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: str, backend: str, dtype: str, max_batch: int | None
    ) -> None:
        config = checkpoint.config
        self.device = find_device(device)
        self.backend = kernels.resolve(backend, self.device)
        self.max_batch = _MAX_BATCH[self.device.type] if max_batch is None else max_batch
        self.dtype = _find_dtype(dtype, self.device)
        self._checkpoint, self._config = checkpoint, config
        self._plain: MambaMIC | MedMamba | None = None
        self._plain_lock = threading.Lock()
        self.fused = self.backend == "cuda" or (
            self.backend == "cpu" and _has_cpu_graph(self.dtype)
        )
        # Pixels are 0 to 255; one multiplication and one addition normalise them.
        mean, std = torch.tensor(config.mean) * 255, torch.tensor(config.std) * 255
        self._scale, self._shift = 1 / std, -mean / std
        on_gpu = self.device.type == "cuda"
        with opening_libraries(self.device) if on_gpu else nullcontext():
            self.network = self._build(read_model(checkpoint, self.backend))
            if self.backend == "cuda":
                nvrtc.prepare()
        self._replay: Replay | None = None
        if self.fused and on_gpu:
            image = (config.input_size, config.input_size, 3)
            outputs = len(config.classes) + len(self._channels)
            self._replay = Replay(self._outputs, image, outputs, self.device, self.max_batch)
        self.warm_up_batches = _WARM_UP if self._replay is not None else (1,)

    def _build(self, model: MambaMIC | MedMamba) -> _Network:
        """Return the network as a function of (B, H, W, 3) uint8, on the device.

        It gives logits and features; where the network's channels lie in these is noted.
        """
        if self.fused and self.device.type == "cuda":
            on_gpu = GpuGraph(model, self.device, self.dtype, self._scale, self._shift)
            self._channels = inverse(on_gpu.out_order)
            return on_gpu.outputs
        if self.fused:
            graph = CpuGraph(model, self.dtype)
            self._channels = inverse(graph.out_order)
            return lambda pixels: graph.outputs(pixels, self._scale, self._shift)
        self._channels = list(range(model.head.in_features))
        plain = self._plain = model.to(self.device)
        scale, shift = (
            values.to(self.device).view(3, 1, 1) for values in (self._scale, self._shift)
        )

        def network(pixels: Tensor) -> tuple[Tensor, Tensor]:
            half = self.dtype != torch.float32
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
                run = forward(plain, pixels.permute(0, 3, 1, 2) * scale + shift)
            return run.logits.float(), run.features.float()

        return network

    def outputs(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return probabilities (B, classes) and embeddings (B, C) of images of the model's size."""
        classes = len(self._config.classes)
        if self._replay is not None:
            result = self._replay(pixels)
        else:
            result = self._in_batches(pixels, classes + len(self._channels))
        # Copies: a view would keep both in memory.
        return result[:, :classes].copy(), result[:, classes:][:, self._channels]

    def _in_batches(self, pixels: Pixels, outputs: int) -> NDArray[np.float32]:
        result = np.empty((len(pixels), outputs), np.float32)
        for start in range(0, len(pixels), self.max_batch):
            part = slice(start, start + self.max_batch)
            # A copy where the array is read-only or strided: torch takes neither.
            batch = torch.from_numpy(np.require(pixels[part], requirements=["C", "W"]))
            result[part] = self._outputs(batch.to(self.device)).cpu().numpy()
        return result

    def plain_module(self) -> MambaMIC | MedMamba:
        """Return the network as torch runs it, in float32 on the device, for gradients.

        It is read from the checkpoint at the first call, and the same for all threads: its
        weights are not to be changed.

        Raises:
            CheckpointError: The checkpoint has been damaged or exchanged since it was loaded.
        """
        with self._plain_lock, torch.inference_mode(False):
            if self._plain is None:
                self._plain = read_model(self._checkpoint, self.backend).to(self.device)
            return self._plain

    def describe(self) -> dict[str, Any]:
        """Return what is in use, as an object that JSON can hold."""
        return {
            "device": str(self.device),
            "device_name": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend,
            "backend_detail": kernels.describe(self.backend),
            "graph": "fused" if self.fused else "plain",
            "versions": {"torch": torch.__version__},
        }

    @torch.inference_mode()
    def _outputs(self, batch: Tensor) -> Tensor:
        """Run the network: (B, H, W, 3) uint8 to (B, classes + C) float32, on the device."""
        logits, features = self.network(batch)
        logits = logits / (self._config.temperature or 1.0)
        chances = logits.softmax(1) if self._config.head == "softmax" else logits.sigmoid()
        return torch.cat([chances, features], dim=1)


def read_model(checkpoint: Checkpoint, backend: str) -> MambaMIC | MedMamba:
    """Build the plain network of a checkpoint, on the CPU and in evaluation mode."""
    config = checkpoint.config
    model = create_model(config.architecture, len(config.classes))
    what = f"the weights in {checkpoint.path} do not fit"
    load_exactly(model, checkpoint.state_dict(), what=what)
    set_scan_backend(model, backend)
    return model.eval().requires_grad_(False)


def _has_cpu_graph(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu.has_bfloat16())


def find_device(name: str) -> torch.device:
    """Return the device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: Not such a name.
        BackendError: There is no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind not in _MAX_BATCH or (":" in name and (kind == "cpu" or not index.isdecimal())):
        raise UsageError(f"device {name!r}", "auto, cpu, cuda or cuda:N", "choose one of these")
    if kind == "cpu":
        return torch.device("cpu")
    if int(index or 0) >= count:
        build = torch.version.cuda or "none, a CPU build"
        raise BackendError(
            f"device {name!r} is not here",
            f"one of the {count} GPUs that torch finds (its CUDA version: {build})",
            'use device="cpu", or install a driver and a CUDA build of torch',
        )
    return torch.device("cuda", int(index or 0))


def _find_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in TORCH_DTYPES:
        raise UsageError(
            f"dtype {name!r}", "auto, " + ", ".join(TORCH_DTYPES), "choose one of these"
        )
    return TORCH_DTYPES[name]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
