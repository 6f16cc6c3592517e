"""The one place where a scan backend is chosen.

``selective_scan_2d(..., backend="auto")`` takes the native kernel of the device that the tensors
are on. It never falls back to the reference: where a native kernel is missing, the error says
how to get it, and ``backend="reference"`` asks for the slow path by name.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambamic.backends import SCAN_BACKENDS
from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.kernels import cpu, cuda, cuda_backward, mamba_ssm, reference

_NATIVE: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "mamba_ssm": mamba_ssm}
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "mamba_ssm": "cuda"}


def status() -> dict[str, str | None]:
    """Return for each backend None where it can be used here, else why not and what to do."""
    found = {name: _NATIVE[name].unavailable() for name in ("cuda", "cpu", "mamba_ssm")}
    return {**found, "reference": None}


def describe(backend: str) -> str:
    """Return one line on a usable backend: its instruction set or device."""
    if backend == "reference":
        return "plain PyTorch, slow"
    return str(_NATIVE[backend].describe())


def resolve(backend: str, device: torch.device) -> str:
    """Return the name of the backend that a request for ``backend`` gets on ``device``.

    Raises:
        UsageError: There is no backend of this name.
        BackendError: It is not available, or works on another device.
    """
    if backend not in SCAN_BACKENDS:
        raise UsageError(
            f"scan backend {backend!r}", f"one of {', '.join(SCAN_BACKENDS)}", "choose one of these"
        )
    if backend == "reference":
        return backend
    wanted = device.type if backend == "auto" else backend
    # A compiler cannot trace the search for libraries; what it compiled fails where it runs.
    looks = wanted in _NATIVE and not torch.compiler.is_compiling()
    reason = _NATIVE[wanted].unavailable() if looks else None
    if reason is not None:
        raise BackendError(
            f"scan backend {wanted!r} is not available here",
            "its native kernel",
            f'{reason}; backend="reference" works everywhere and is slow',
        )
    if _DEVICE.get(wanted) != device.type:
        raise BackendError(
            f"scan backend {backend!r} on device {device.type!r}",
            f"device {_DEVICE[backend]!r}" if backend in _DEVICE else "cpu or cuda",
            'move the model there, or ask for backend="reference"',
        )
    return wanted


def selective_scan_2d(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Run the selective scan over an image in four directions and sum the results.

    Args:
        x: (B, H, W, D), the image.
        projections: (B, H, W, K, R + 2 N): per position and direction dt (R), B (N), C (N).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A: (K, D, N), negative.
        skip: (K, D).
        backend: One of ``SCAN_BACKENDS``.

    Returns:
        (B, H, W, D) in the dtype of ``x``, where float16 is finite: what it cannot hold becomes
        its largest. States are float32 (float64 in the reference).

    Raises:
        ShapeError: The shapes do not fit together.
        BackendError: The backend is not available, with how to get it.
    """
    _check_shapes(x, projections, dt_weight, dt_bias, A, skip)
    chosen = resolve(backend, x.device)
    if chosen == "reference":
        return reference.selective_scan_2d(x, projections, dt_weight, dt_bias, A, skip)
    tensors = (x, projections.to(x.dtype), dt_weight, dt_bias, A, skip)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    y: Tensor = _scan(*tensors, chosen, keep)[0]
    return y


def _check_shapes(
    x: Tensor, projections: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, skip: Tensor
) -> None:
    if x.ndim != 4 or dt_weight.ndim != 3 or A.ndim != 3:
        shapes = [tuple(t.shape) for t in (x, dt_weight, A)]
        raise ShapeError(
            f"x, dt_weight and A of shapes {shapes}",
            "(B, H, W, D), (K, D, R) and (K, D, N)",
            "pass image-layout tensors",
        )
    (batch, height, width, d), (k, _, rank), n = x.shape, dt_weight.shape, A.shape[2]
    expected = {
        "projections": (projections, (batch, height, width, k, rank + 2 * n)),
        "dt_weight": (dt_weight, (reference.N_DIRECTIONS, d, rank)),
        "dt_bias": (dt_bias, (k, d)),
        "A": (A, (k, d, n)),
        "skip": (skip, (k, d)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} of shape {tuple(tensor.shape)} with x of {tuple(x.shape)}, "
                f"dt_weight of {tuple(dt_weight.shape)} and A of {tuple(A.shape)}",
                f"shape {shape}",
                "check the module's widths",
            )
        if tensor.device != x.device:
            raise BackendError(
                f"{name} on {tensor.device} with x on {x.device}", "one device", "move the model"
            )


# The native kernels are opaque to autograd and to the compiler: one custom operator stands for
# them, so that torch.compile, torch.export and CUDA graphs all see the same thing.


@torch.library.custom_op("mambamic::selective_scan_2d", mutates_args=())
def _scan(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    if backend == "cuda":
        return cuda.forward(x, projections, dt_weight, dt_bias, A, skip, keep=keep)
    if backend == "mamba_ssm":
        return mamba_ssm.forward(x, projections, dt_weight, dt_bias, A, skip, keep=keep)
    return cpu.forward(x, projections, dt_weight, dt_bias, A, skip), x.new_empty(0)


@_scan.register_fake
def _(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    if backend in ("cuda", "mamba_ssm"):
        shape = _NATIVE[backend].states_shape(x, A) if keep else (0,)
        return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0)


@torch.library.custom_op("mambamic::selective_scan_2d_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    skip: Tensor,
    states: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "cuda":
        return cuda_backward.backward(grad_y, x, projections, dt_weight, dt_bias, A, skip, states)
    if backend == "mamba_ssm":
        return mamba_ssm.backward(grad_y, x, projections, dt_weight, dt_bias, A, skip, states)
    return cpu.backward(grad_y, x, projections, dt_weight, dt_bias, A, skip)


@_scan_backward.register_fake
def _(grad_y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in rest[:6])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, backend, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.backend = backend


def _backward(ctx: Any, grad_y: Tensor, _grad_states: Tensor | None) -> tuple[Any, ...]:
    return (*_scan_backward(grad_y, *ctx.saved_tensors, ctx.backend), None, None)


_scan.register_autograd(_backward, setup_context=_setup_context)
