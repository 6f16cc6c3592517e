"""The ``Classifier``: from pixels to probabilities, the same through whichever door they came."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mambamic import kernels
from mambamic._version import __version__
from mambamic.checkpoint import Checkpoint, load_checkpoint
from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.graph.cpu import CpuGraph
from mambamic.graph.fold import inverse
from mambamic.graph.gpu import GpuGraph
from mambamic.graph.plain import forward
from mambamic.graph.replay import Replay
from mambamic.images import to_rgb
from mambamic.kernels import cpu
from mambamic.models import create_model, load_exactly, set_scan_backend
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba
from mambamic.ood import load_detector
from mambamic.prediction import Prediction
from mambamic.preprocess import Pixels

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_Network = Callable[[Tensor], tuple[Tensor, Tensor]]
_MAX_BATCH = {"cpu": 32, "cuda": 256}
_WARM_UP = (1, 2, 4, 8, 16, 32)  # the batches of a server; larger ones are bulk work and can wait


class Classifier:
    """A checkpoint on a device, ready to classify. Made by ``Classifier.load``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: MambaMIC | MedMamba,
        device: torch.device,
        backend: str,
        dtype: torch.dtype,
        max_batch: int,
    ) -> None:
        config = checkpoint.config
        self._checkpoint = checkpoint
        self._detector = load_detector(checkpoint)
        self._plain: MambaMIC | MedMamba | None = None
        self._plain_lock = threading.Lock()
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
            outputs = len(config.classes) + len(self._channels)
            self._replay = Replay(self._outputs, image, outputs, device, max_batch)

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
        model = _read_model(opened, chosen)
        limit = _MAX_BATCH[place.type] if max_batch is None else max_batch
        if limit < 1:
            raise UsageError(f"max_batch {limit}", "at least 1", "give a larger one")
        return cls(opened, model, place, chosen, _find_dtype(dtype, place), limit)

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
        return self.predictions(*self.outputs(np.stack(pixels))) if pixels else []

    def probabilities(self, pixels: Pixels) -> NDArray[np.float32]:
        """Classify images that are already of the model's size.

        Args:
            pixels: (B, input_size, input_size, 3) uint8 RGB, as ``Preprocess.pixels`` gives them.

        Returns:
            (B, classes).

        Raises:
            ShapeError: An array of another shape or type.
        """
        return self.outputs(pixels)[0]

    def embeddings(self, pixels: Pixels) -> NDArray[np.float32]:
        """Return what the network's head sees: the mean of the last feature map.

        Args:
            pixels: As for ``probabilities``.

        Returns:
            (B, C), C the width of the last stage, in the network's own order of channels.

        Raises:
            ShapeError: An array of another shape or type.
        """
        return self.outputs(pixels)[1]

    def outputs(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return ``probabilities`` and ``embeddings`` of images, computed together.

        Args:
            pixels: As for ``probabilities``.

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
        classes = len(self.config.classes)
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

    def predictions(
        self,
        probabilities: NDArray[np.float32],
        embeddings: NDArray[np.float32],
        *,
        embed: bool = False,
    ) -> list[Prediction]:
        """Say what rows of ``outputs`` stand for.

        Args:
            probabilities: (B, classes).
            embeddings: (B, C).
            embed: Whether the embeddings are to go with the predictions.
        """
        classes = self.config.classes
        scores = None if self._detector is None else self._detector.scores(embeddings).tolist()
        predictions = []
        for place, row in enumerate(probabilities.tolist()):
            best = max(range(len(classes)), key=row.__getitem__)
            named = dict(zip(classes, row, strict=True))
            embedding = tuple(embeddings[place].tolist()) if embed else None
            score = None if scores is None else scores[place]
            predictions.append(Prediction(classes[best], row[best], named, embedding, score))
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

    def plain_module(self) -> MambaMIC | MedMamba:
        """Return the network as torch runs it, in float32 on the device, for gradients.

        It is read from the checkpoint at the first call, and the same for all threads: its
        weights are not to be changed.

        Raises:
            CheckpointError: The checkpoint has been damaged or exchanged since it was loaded.
        """
        with self._plain_lock, torch.inference_mode(False):
            if self._plain is None:
                self._plain = _read_model(self._checkpoint, self.backend).to(self.device)
            return self._plain

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
    def _outputs(self, batch: Tensor) -> Tensor:
        """Run the network: (B, H, W, 3) uint8 to (B, classes + C) float32, on the device."""
        logits, features = self._network(batch)
        logits = logits / (self.config.temperature or 1.0)
        chances = logits.softmax(1) if self.config.head == "softmax" else logits.sigmoid()
        return torch.cat([chances, features], dim=1)


def _read_model(checkpoint: Checkpoint, backend: str) -> MambaMIC | MedMamba:
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
