"""A network on ONNX Runtime, from a file that ``mambamic onnx`` wrote: no torch is needed."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mambamic.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint
from mambamic.config import Config
from mambamic.errors import BackendError, CheckpointError, UsageError
from mambamic.machine import usable_cpus
from mambamic.preprocess import Pixels

if TYPE_CHECKING:
    import onnxruntime

ONNX_FILE = "model.onnx"  # in a folder, and in an archive
CONFIG_KEY = "mambamic.config"  # of the metadata: the checkpoint's config.json
INPUT_KEY = "mambamic.input"
UINT8_INPUT, FLOAT_INPUT = "uint8 NHWC", "float32 NCHW"
# What of a config decides on the answer.
_DECIDING = (
    *("architecture", "classes", "input_size", "resize", "interpolation", "mean", "std"),
    *("head", "temperature", "weights_sha256"),
)
_OUTPUTS = ("probabilities", "features")
_MAX_BATCH = 32
_AGAIN = "write the file anew by: mambamic onnx CHECKPOINT model.onnx"


@dataclass(frozen=True)
class Device:
    """Where ONNX Runtime computes: the part of torch.device that others look at."""

    type: str = "cpu"

    def __str__(self) -> str:
        return self.type


@dataclass(frozen=True)
class OnnxModel:
    """An opened file.

    Args:
        checkpoint: What the file says about itself, in the folder where it lies.
        session: Ready to run.
    """

    checkpoint: Checkpoint
    session: onnxruntime.InferenceSession


def find_onnx(place: Path, *, asked: bool) -> Path | None:
    """Return the ONNX file that a path stands for, None where it is a checkpoint with weights.

    Args:
        place: A file, or a folder.
        asked: Whether ONNX Runtime was asked for by name.

    Raises:
        CheckpointError: It was asked for, and there is no file for it.
    """
    if place.suffix == ".onnx" and not place.is_dir():
        return place
    file = place / ONNX_FILE
    if file.is_file() and (asked or not (place / WEIGHTS_FILE).exists()):
        return file
    if asked:
        raise CheckpointError(
            f"{place} has no {ONNX_FILE}",
            "a file for ONNX Runtime",
            f"write one by: mambamic onnx {place} model.onnx, and give that",
        )
    return None


def open_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """Open a file.

    Raises:
        CheckpointError: It is missing or damaged, or ``mambamic onnx`` did not write it.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    file = Path(path)
    options = onnxruntime.SessionOptions()
    # The scan is thousands of small steps: threads that share each of them wait for each other more
    # than they compute. ``OnnxEngine`` gives each thread an image of its own.
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror})", "an ONNX file", "check the path"
        ) from error
    except (
        *(state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf),
        *(state.NotImplemented, state.RuntimeException),
    ) as error:
        raise CheckpointError(
            f"{file} cannot be loaded ({str(error).splitlines()[0][:200]})",
            "an ONNX file that is whole",
            _AGAIN,
        ) from error
    stated = session.get_modelmeta().custom_metadata_map
    if CONFIG_KEY not in stated or stated.get(INPUT_KEY) != UINT8_INPUT:
        raise CheckpointError(
            f"{file} has the metadata {sorted(stated)} and the input {stated.get(INPUT_KEY)!r}",
            f"{CONFIG_KEY} and the input {UINT8_INPUT!r}",
            _AGAIN,
        )
    config = Config.from_json(stated[CONFIG_KEY])
    _check_not_stale(file, config)
    return OnnxModel(Checkpoint(file.parent, config), session)


def _threads() -> int:
    """Return how many images to compute at once: ``OMP_NUM_THREADS``, or all cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdecimal() and int(chosen) else usable_cpus()


def _check_not_stale(file: Path, config: Config) -> None:
    """Refuse a file beside a checkpoint that has changed since it was written."""
    beside = file.with_name(CONFIG_FILE)
    if not beside.exists():
        return
    now = Config.from_json(beside.read_text(encoding="utf-8"))
    for name in _DECIDING:
        if getattr(now, name) != getattr(config, name):
            raise CheckpointError(
                f"{file} has the {name} {getattr(config, name)!r}, and {beside} "
                f"{getattr(now, name)!r}",
                "a file of this checkpoint as it is now",
                _AGAIN,
            )


class OnnxEngine:
    """An ONNX file's network on the CPU, as ``TorchEngine`` is one with torch.

    Args:
        model: Opened.
        device: ``auto`` or ``cpu``.
        dtype: ``auto`` or ``float32``.
        max_batch: How many images are best given at once; None for 32.

    Raises:
        BackendError: Another device.
        UsageError: Another dtype.
    """

    backend, dtype, fused = "onnxruntime", "float32", True
    warm_up_batches = (1,)

    def __init__(self, model: OnnxModel, device: str, dtype: str, max_batch: int | None) -> None:
        if device not in ("auto", "cpu"):
            raise BackendError(
                f"device {device!r} with ONNX Runtime",
                "cpu",
                "leave the device out, or give the checkpoint that the file was made from",
            )
        if dtype not in ("auto", self.dtype):
            raise UsageError(
                f"dtype {dtype!r} with ONNX Runtime", "auto or float32", "choose one of these"
            )
        self.device = Device()
        self.max_batch = _MAX_BATCH if max_batch is None else max_batch
        self.session = model.session
        self._pool = ThreadPoolExecutor(_threads(), "onnxruntime")

    def outputs(self, pixels: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return probabilities (B, classes) and embeddings (B, C) of images of the model's size."""
        rows = list(self._pool.map(self._row, pixels))
        widths = {output.name: output.shape[1] for output in self.session.get_outputs()}
        probabilities, embeddings = (
            np.concatenate([np.empty((0, widths[name]), np.float32), *(row[i] for row in rows)])
            for i, name in enumerate(_OUTPUTS)
        )
        return probabilities, embeddings

    def _row(self, image: Pixels) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = self.session.run(
            _OUTPUTS, {"pixels": np.ascontiguousarray(image[np.newaxis])}
        )
        return found

    def plain_module(self) -> NoReturn:
        """Refuse: gradients need the network under torch."""
        raise BackendError(
            "an explanation by ONNX Runtime",
            "a checkpoint with weights, under torch",
            "explain with the checkpoint that the file was made from",
        )

    def describe(self) -> dict[str, Any]:
        """Return what is in use, as an object that JSON can hold."""
        import onnxruntime

        return {
            "device": str(self.device),
            "device_name": platform.processor() or platform.machine(),
            "dtype": self.dtype,
            "backend": self.backend,
            "backend_detail": f"ONNX Runtime, {self.session.get_providers()[0]}",
            "graph": "fused",
            "versions": {"onnxruntime": onnxruntime.__version__},
        }
