"""The ``Classifier``: from pixels to probabilities, the same through whichever door they came."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mambamic import kernels
from mambamic._version import __version__
from mambamic.checkpoint import Checkpoint, load_checkpoint
from mambamic.config import Config
from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.graph.cpu import CpuGraph
from mambamic.graph.gpu import GpuGraph
from mambamic.graph.replay import Replay
from mambamic.images import to_rgb
from mambamic.kernels import cpu
from mambamic.models import create_model, load_exactly, set_scan_backend
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba
from mambamic.preprocess import Pixels

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_BATCH = {"cpu": 32, "cuda": 256}
_WARM_UP = (1, 2, 4, 8, 16, 32)  # the batches of a server; larger ones are bulk work and can wait


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Args:
        label: The most probable class.
        probability: Of that class.
        probabilities: Of every class, in the checkpoint's order.
    """

    label: str
    probability: float
    probabilities: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return it as an object that JSON can hold, with six significant digits."""
        return {
            "label": self.label,
            "probability": _six_digits(self.probability),
            "probabilities": {name: _six_digits(p) for name, p in self.probabilities.items()},
        }


class Classifier:
    """A checkpoint on a device, ready to classify. Made by ``Classifier.load``."""

    def __init__(
        self,
        config: Config,
        model: MambaMIC | MedMamba,
        device: torch.device,
        backend: str,
        dtype: torch.dtype,
        max_batch: int,
    ) -> None:
        self.config = config
        self.preprocess = config.preprocess
        self.device = device
        self.backend = backend
        self.dtype = dtype
        self.max_batch = max_batch
        self.fused = backend == "cuda" or (backend == "cpu" and _has_cpu_graph(dtype))
        # Pixels are 0 to 255; one multiplication and one addition normalise them.
        mean, std = torch.tensor(config.mean) * 255, torch.tensor(config.std) * 255
        self._scale, self._shift = 1 / std, -mean / std
        self._network = self._build(model)
        self._replay: Replay | None = None
        if self.fused and device.type == "cuda":
            image = (config.input_size, config.input_size, 3)
            self._replay = Replay(
                self._probabilities, image, len(config.classes), device, max_batch
            )

    def _build(self, model: MambaMIC | MedMamba) -> Callable[[Tensor], Tensor]:
        """Return the network as a function of (B, H, W, 3) uint8 to logits, on the device."""
        if self.fused and self.device.type == "cuda":
            return GpuGraph(model, self.device, self.dtype, self._scale, self._shift)
        if self.fused:
            graph = CpuGraph(model, self.dtype)
            return lambda pixels: graph(pixels, self._scale, self._shift)
        plain = model.to(self.device)
        scale, shift = (
            values.to(self.device).view(3, 1, 1) for values in (self._scale, self._shift)
        )

        def network(pixels: Tensor) -> Tensor:
            half = self.dtype != torch.float32
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
                logits: Tensor = plain(pixels.permute(0, 3, 1, 2) * scale + shift)
            return logits.float()

        return network

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str] | Checkpoint,
        device: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        *,
        max_batch: int | None = None,
    ) -> Classifier:
        """Load a checkpoint onto a device.

        Args:
            checkpoint: A folder, or an opened checkpoint.
            device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
            backend: Of the scan: ``auto`` (the device's native kernel) or its name.
            dtype: ``auto`` (float32 on a CPU, float16 on a GPU), ``float32``, ``float16`` or
                ``bfloat16``. Norms, state-space parameters and states stay float32.
            max_batch: Larger batches are split; by default 32 on a CPU, 256 on a GPU.

        Raises:
            CheckpointError: The checkpoint is damaged, or its weights do not fit its config.
            BackendError: The device or the backend is not available here.
            UsageError: A name that does not exist.
        """
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
        place = find_device(device)
        chosen = kernels.resolve(backend, place)
        config = opened.config
        model = create_model(config.architecture, len(config.classes))
        load_exactly(model, opened.state_dict(), what=f"the weights in {opened.path} do not fit")
        set_scan_backend(model, chosen)
        limit = _MAX_BATCH[place.type] if max_batch is None else max_batch
        if limit < 1:
            raise UsageError(f"max_batch {limit}", "at least 1", "give a larger one")
        model = model.eval().requires_grad_(False)
        return cls(config, model, place, chosen, _find_dtype(dtype, place), limit)

    def predict(self, images: Sequence[Image.Image | Pixels]) -> list[Prediction]:
        """Classify images.

        Args:
            images: PIL images of any mode, which are converted as files are, or (H, W, 3) uint8
                RGB arrays; of any size.

        Returns:
            One prediction per image, in order.

        Raises:
            ShapeError: An array of another shape or type.
            DecodeError: A PIL image with damaged pixels.
        """
        pixels = [
            self.preprocess.pixels(_as_image(image, place)) for place, image in enumerate(images)
        ]
        return self.predictions(self.probabilities(np.stack(pixels))) if pixels else []

    def probabilities(self, pixels: Pixels) -> NDArray[np.float32]:
        """Classify images that are already of the model's size.

        Args:
            pixels: (B, input_size, input_size, 3) uint8 RGB, as ``Preprocess.pixels`` gives them.

        Returns:
            (B, classes).

        Raises:
            ShapeError: An array of another shape or type.
        """
        size = self.config.input_size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise ShapeError(
                f"pixels of shape {pixels.shape} and type {pixels.dtype}",
                f"(B, {size}, {size}, 3) and uint8",
                "use Classifier.predict, or bring them to this form with Preprocess.pixels",
            )
        if self._replay is not None:
            return self._replay(pixels)
        result = np.empty((len(pixels), len(self.config.classes)), np.float32)
        for start in range(0, len(pixels), self.max_batch):
            part = slice(start, start + self.max_batch)
            # A copy where the array is read-only or strided: torch takes neither.
            batch = torch.from_numpy(np.require(pixels[part], requirements=["C", "W"]))
            result[part] = self._probabilities(batch.to(self.device)).cpu().numpy()
        return result

    def predictions(self, probabilities: NDArray[np.float32]) -> list[Prediction]:
        """Name the classes that rows of probabilities stand for.

        Args:
            probabilities: (B, classes).
        """
        classes = self.config.classes
        predictions = []
        for row in probabilities.tolist():
            best = max(range(len(classes)), key=row.__getitem__)
            predictions.append(
                Prediction(classes[best], row[best], dict(zip(classes, row, strict=True)))
            )
        return predictions

    def warm_up(self) -> None:
        """Classify blank images once, so that no user waits for kernels to be compiled.

        On a GPU this is done for each batch that a server comes to; the larger ones are bulk work.
        """
        size = self.config.input_size
        batches = _WARM_UP if self._replay is not None else (1,)
        for batch in batches:
            if batch <= max(1, self.max_batch):
                self.probabilities(np.zeros((batch, size, size, 3), np.uint8))

    def describe(self) -> dict[str, Any]:
        """Return what is in use, as an object that JSON can hold."""
        return {
            "architecture": self.config.architecture,
            "classes": len(self.config.classes),
            "input_size": self.config.input_size,
            "device": str(self.device),
            "device_name": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend,
            "backend_detail": kernels.describe(self.backend),
            "graph": "fused" if self.fused else "plain",
            "max_batch": self.max_batch,
            "versions": {
                "mambamic": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    @torch.inference_mode()
    def _probabilities(self, batch: Tensor) -> Tensor:
        """Run the network: (B, H, W, 3) uint8 to (B, classes) float32, both on the device."""
        logits = self._network(batch) / (self.config.temperature or 1.0)
        return logits.softmax(1) if self.config.head == "softmax" else logits.sigmoid()


def _has_cpu_graph(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu.has_bfloat16())


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


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
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r}", "auto, " + ", ".join(DTYPES), "choose one of these")
    return DTYPES[name]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _as_image(image: Image.Image | Pixels, index: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ShapeError(
            f"image {index} is an array of shape {image.shape} and type {image.dtype}",
            "(H, W, 3) and uint8, RGB",
            "convert it, or pass what mambamic.images.decode returns",
        )
    return Image.fromarray(image)
