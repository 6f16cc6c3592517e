"""Compiles CUDA C++ at run time and launches it on torch's current stream.

No compiler is needed on the machine: NVRTC is a library that torch's CUDA wheels bring along,
and NVIDIA's ``cuda-core`` binds it. A program's sources include nothing and take their sizes as
macros; each combination is compiled once, in about a second, and kept in the user's cache folder.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int32
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parent / "native" / "cuda"
_recording = threading.local()


@functools.cache
def missing_module() -> str | None:
    """Return what compiling needs and does not find; looked up once, as every scan asks."""
    for module in ("cuda", "cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(module) is None:
            return module
    return None


def prepare() -> None:
    """Import what compiles and open its cache, so that a first launch need not: 0.2 s."""
    from cuda.bindings import driver, nvrtc  # noqa: F401

    _cache()


@functools.cache
def _cache() -> Any | None:
    """Return the on-disk cache of compiled programs, or None where it is not writable."""
    from cuda.core.utils import FileStreamProgramCache

    try:
        return FileStreamProgramCache()
    except OSError:
        return None


@functools.cache
def _program(device: int, sources: tuple[str, ...], macros: tuple[tuple[str, int], ...]) -> Any:
    """Return the compiled sources as an object code from which kernels are taken."""
    from cuda.core import Device, Program, ProgramOptions

    Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    options = ProgramOptions(
        std="c++17",
        arch=f"sm_{major}{minor}",
        define_macro=[(name, str(value)) for name, value in macros],
    )
    text = "\n".join((SOURCES / source).read_text() for source in sources)
    return Program(text, "c++", options).compile("cubin", cache=_cache())


@functools.cache
def _kernel(
    device: int, sources: tuple[str, ...], name: str, macros: tuple[tuple[str, int], ...]
) -> Any:
    """Return one kernel, allowed to use all the shared memory that a block can have."""
    from cuda.bindings import driver

    kernel = _program(device, sources, ((f"KERNEL_{name}", 1), *macros)).get_kernel(name)
    attribute = driver.CUfunction_attribute
    static = attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    status, used = driver.cuKernelGetAttribute(static, kernel.handle, device)
    properties: Any = torch.cuda.get_device_properties(device)
    free = properties.shared_memory_per_block_optin - used
    if status == driver.CUresult.CUDA_SUCCESS:
        (status,) = driver.cuKernelSetAttribute(dynamic, free, kernel.handle, device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} cannot have {free} bytes of shared memory: {status}")
    return kernel


def launch(
    sources: tuple[str, ...],
    name: str,
    macros: Mapping[str, int],
    grid: tuple[int, ...],
    threads: int,
    *arguments: Tensor | int | float | None,
    shared_bytes: int = 0,
) -> None:
    """Launch a kernel on torch's current stream of the first tensor's device.

    Args:
        sources: Files in ``native/cuda``, compiled in this order as one text.
        name: An ``extern "C"`` kernel in them; ``KERNEL_name`` is defined for the compilation.
        macros: Defined as well.
        grid: Blocks.
        threads: Per block.
        arguments: Tensors go as their addresses, None as a null pointer, integers as int, floats
            as float.
        shared_bytes: Dynamic shared memory per block.
    """
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as launch_kernel

    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    assert device.index is not None  # tensors on a GPU always have one
    key = (device.index, sources, name, tuple(macros.items()))
    recorded: set[Any] | None = getattr(_recording, "keys", None)
    if recorded is not None:
        recorded.add(key)
        return
    with torch.cuda.device(device):
        kernel = _kernel(*key)
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        config = LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)
        launch_kernel(stream, config, kernel, *map(_as_argument, arguments))


def compile_ahead(work: Callable[[], object]) -> None:
    """Compile all that some work would launch, on all cores at once.

    Args:
        work: Called once on this thread; its launches are noted and do nothing, so that what it
            returns is meaningless.
    """
    _recording.keys = set()
    try:
        work()
        keys = list(_recording.keys)
    finally:
        _recording.keys = None
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda key: _kernel(*key), keys))


def _as_argument(value: Tensor | int | float | None) -> Any:
    # A pointer goes as a plain Python integer, 64 bits wide; C numbers must say their width.
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return c_int32(value) if isinstance(value, int) else c_float(value)
