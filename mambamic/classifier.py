"""The ``Classifier``: from pixels to probabilities, the same through whichever door they came.

Nothing here needs torch: with a file that ``mambamic onnx`` wrote, ONNX Runtime is enough.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mambamic._version import __version__
from mambamic.backends import BACKENDS
from mambamic.checkpoint import Checkpoint, load_checkpoint
from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.graph.onnx import OnnxEngine, find_onnx, open_onnx
from mambamic.images import to_rgb
from mambamic.ood import Detector, load_detector
from mambamic.prediction import Prediction
from mambamic.preprocess import Pixels

if TYPE_CHECKING:
    from mambamic.engine import TorchEngine
    from mambamic.models.mambamic import MambaMIC
    from mambamic.models.medmamba import MedMamba

DTYPES = ("float32", "float16", "bfloat16")


class Classifier:
    """A checkpoint on a device, ready to classify. Made by ``Classifier.load``."""

    def __init__(
        self, checkpoint: Checkpoint, engine: TorchEngine | OnnxEngine, detector: Detector | None
    ) -> None:
        self._detector = detector
        self._engine = engine
        self.config = checkpoint.config
        self.preprocess = checkpoint.config.preprocess
        # torch's own, or the names of both with ONNX Runtime.
        self.device: Any = engine.device
        self.dtype: Any = engine.dtype
        self.backend = engine.backend
        self.max_batch = engine.max_batch
        self.fused = engine.fused

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str] | Checkpoint,
        device: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        *,
        max_batch: int | None = None,
        detect: bool = True,
    ) -> Classifier:
        """Load a checkpoint onto a device.

        Args:
            checkpoint: A folder, an opened checkpoint, or a file that ``mambamic onnx`` wrote.
            device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
            backend: Of the scan: ``auto`` (the device's native kernel) or its name; or
                ``onnxruntime``, which ``auto`` is for an ONNX file.
            dtype: ``auto`` (float32 on a CPU, float16 on a GPU), ``float32``, ``float16`` or
                ``bfloat16``. Norms, state-space parameters and states stay float32.
            max_batch: Larger batches are split; by default 32 on a CPU, 256 on a GPU.
            detect: Read the detector of images of another kind, where the checkpoint has one.

        Raises:
            CheckpointError: The checkpoint or its detector is damaged, or its weights do not fit
                its config.
            BackendError: The device or the backend is not available here.
            UsageError: A name that does not exist.
        """
        if max_batch is not None and max_batch < 1:
            raise UsageError(f"max_batch {max_batch}", "at least 1", "give a larger one")
        if backend not in BACKENDS:
            raise UsageError(
                f"backend {backend!r}", f"one of {', '.join(BACKENDS)}", "choose one of these"
            )
        place = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
        file = find_onnx(place, asked=backend == "onnxruntime")
        if file is not None:
            if backend not in ("auto", "onnxruntime"):
                raise BackendError(
                    f"backend {backend!r} for {file}",
                    "onnxruntime",
                    "leave the backend out, or give the checkpoint that the file was made from",
                )
            onnx = open_onnx(file)
            detector = load_detector(onnx.checkpoint) if detect else None
            return cls(onnx.checkpoint, OnnxEngine(onnx, device, dtype, max_batch), detector)
        # Here, because a torch-free installation classifies, too.
        from mambamic.engine import TorchEngine

        opened = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
        detector = load_detector(opened) if detect else None
        return cls(opened, TorchEngine(opened, device, backend, dtype, max_batch), detector)

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
        return self._engine.outputs(pixels)

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
        for batch in self._engine.warm_up_batches:
            if batch <= max(1, self.max_batch):
                self.probabilities(np.zeros((batch, size, size, 3), np.uint8))

    def plain_module(self) -> MambaMIC | MedMamba:
        """Return the network as torch runs it, in float32 on the device, for gradients.

        It is read from the checkpoint at the first call, and the same for all threads: its
        weights are not to be changed.

        Raises:
            CheckpointError: The checkpoint has been damaged or exchanged since it was loaded.
            BackendError: There is none: ONNX Runtime computes no gradients.
        """
        return self._engine.plain_module()

    def describe(self) -> dict[str, Any]:
        """Return what is in use, as an object that JSON can hold."""
        own = self._engine.describe()
        return {
            "architecture": self.config.architecture,
            "classes": len(self.config.classes),
            "input_size": self.config.input_size,
            **own,
            "max_batch": self.max_batch,
            "versions": {
                "mambamic": __version__,
                **own["versions"],
                "python": platform.python_version(),
            },
        }


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
