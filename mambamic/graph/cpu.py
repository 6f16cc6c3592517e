"""The inference graph on CPUs: one call of the native library per image."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.graph import cpu_mambamic, cpu_medmamba
from mambamic.graph.cpu_layers import Layout
from mambamic.graph.cpu_steps import Kind, Program
from mambamic.kernels import cpu
from mambamic.models.layers import check_image
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba

_GROUP = 4  # images that go together in a batch
_IDLE = 4  # programs kept for the next call, each with the memory of its maps: 13 MB an image


class _Prepared:
    """A program for one shape of input, with the places that each call fills in."""

    def __init__(
        self,
        network: cpu_mambamic.Network | cpu_medmamba.Network,
        shape: torch.Size,
        level: str,
    ) -> None:
        self.program = Program(level)
        self.images = self.program.buffer("images", *shape)
        self.program.add(Kind.PIXELS, shape, out=self.images)
        self.logits, self.features = network.add(self.program, self.images)
        self.pixels = self.program.seal()


class CpuGraph:
    """A trained model rewritten for the native library.

    Several threads may call it at once.

    Args:
        model: MambaMIC or MedMamba in evaluation mode, on the CPU; later changes of its weights
            are not seen.
        dtype: Of the weights of matrix products: float32, or bfloat16 on processors with AMX.
            All else is float32.

    Raises:
        BackendError: The native library is missing, or the processor lacks the instruction set
            that MAMBAMIC_CPU_SIMD names, or AMX for bfloat16.
        UsageError: Another dtype.
    """

    def __init__(self, model: MambaMIC | MedMamba, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(
                f"dtype {dtype}", "float32 or bfloat16 on a CPU", "choose one of these"
            )
        self._level = cpu.level()
        if dtype == torch.bfloat16 and not cpu.has_bfloat16():
            raise BackendError(
                "no bfloat16 in the inference graph on this processor",
                "one with AMX tiles (amx_bf16)",
                "use float32",
            )
        layout = Layout(self._level, dtype)
        with torch.inference_mode():
            self._network = (
                cpu_mambamic.Network(model, layout)
                if isinstance(model, MambaMIC)
                else cpu_medmamba.Network(model, layout)
            )
        self._minimum, self._square = model.minimum_size, isinstance(model, MambaMIC)
        self._classes, self._channels = model.head.out_features, model.head.in_features
        self.out_order: Sequence[int] = self._network.out_order
        self._idle: deque[_Prepared] = deque(maxlen=_IDLE)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Classify images.

        Args:
            pixels: (B, H, W, 3) uint8.
            scale: (3,), what a channel is multiplied by, 1 / (255 std).
            shift: (3,), what is then added, -mean / std.

        Returns:
            Logits (B, classes), float32.

        Raises:
            ShapeError: The images are too small, or not square where they must be.
            UsageError: The pixels are of another dtype.
        """
        return self.outputs(pixels, scale, shift)[0]

    @torch.inference_mode()
    def outputs(self, pixels: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images, and return what the head saw as well.

        Args:
            pixels: As for a call.
            scale: Likewise.
            shift: Likewise.

        Returns:
            Logits (B, classes) and features (B, C), whose channel ``j`` is the network's
            ``out_order[j]``; float32.

        Raises:
            ShapeError: As a call does.
            UsageError: Likewise.
        """
        if pixels.dtype != torch.uint8:
            raise UsageError(f"pixels of {pixels.dtype}", "uint8", "pass pixels from 0 to 255")
        self._check(pixels)
        pixels = pixels.contiguous()
        scale, shift = scale.float().contiguous(), shift.float().contiguous()

        def run(prepared: _Prepared, part: Tensor) -> None:
            step = prepared.pixels
            step.input, step.scale, step.shift = (t.data_ptr() for t in (part, scale, shift))
            prepared.program.run()

        return self._in_groups(pixels, run)

    @torch.inference_mode()
    def normalised(self, x: Tensor) -> Tensor:
        """Classify images that are already normalised.

        Args:
            x: (B, 3, H, W), as the plain module takes them.

        Returns:
            Logits (B, classes), float32.

        Raises:
            ShapeError: The images are too small, or not square where they must be.
        """
        images = x.permute(0, 2, 3, 1)
        self._check(images)

        def run(prepared: _Prepared, part: Tensor) -> None:
            prepared.images.copy_(part)
            prepared.program.run(first=1)

        return self._in_groups(images, run)[0]

    def _in_groups(
        self, images: Tensor, run: Callable[[_Prepared, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Run a few images at a time: all of a batch would not stay in the caches."""
        logits = torch.empty(len(images), self._classes)
        features = torch.empty(len(images), self._channels)
        start = 0
        while start < len(images):
            part = images[start : start + (_GROUP if len(images) - start >= _GROUP else 1)]
            prepared = self._take(part.shape)
            run(prepared, part)
            logits[start : start + len(part)] = prepared.logits
            features[start : start + len(part)] = prepared.features
            self._give_back(prepared)
            start += len(part)
        return logits, features

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[3] != 3:
            raise ShapeError(
                f"images of shape {tuple(images.shape)}", "(B, H, W, 3)", "pass RGB images"
            )
        check_image(images.permute(0, 3, 1, 2), self._minimum, square=self._square)

    def _take(self, shape: torch.Size) -> _Prepared:
        """Return a program for this shape of input that no other thread uses."""
        with self._lock:
            for prepared in self._idle:
                if prepared.images.shape == shape:
                    self._idle.remove(prepared)
                    return prepared
        return _Prepared(self._network, shape, self._level)

    def _give_back(self, prepared: _Prepared) -> None:
        with self._lock:
            self._idle.append(prepared)
