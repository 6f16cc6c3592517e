"""The dispatcher: which backend is taken, what is refused, and what autograd and compilers see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mambamic import create_model
from mambamic.backends import SCAN_BACKENDS
from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.kernels import cuda, describe, mamba_ssm, resolve, scan, status
from mambamic.kernels import selective_scan_2d as dispatch
from mambamic.models import set_scan_backend
from mambamic.models.mambamic import MambaMIC, MambaMICConfig
from tests.test_kernels_cpu import NAMES, TOLERANCE, error, exact, inputs

SIZE = (2, 5, 6, 8, 2, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small operations: where cores are shared, threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named() -> dict[str, Tensor]:
    return dict(zip(NAMES, inputs(*SIZE), strict=True))


@pytest.mark.parametrize(
    ("backend", "expected"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")]
)
def test_what_a_cpu_gets(backend: str, expected: str) -> None:
    assert resolve(backend, CPU) == expected


def test_the_reference_works_on_any_device() -> None:
    meta = tuple(tensor.to("meta") for tensor in inputs(*SIZE))
    assert resolve("reference", torch.device("meta")) == "reference"
    assert dispatch(*meta, backend="reference").shape == meta[0].shape


@pytest.mark.gpu
def test_what_a_gpu_gets() -> None:
    gpu = torch.device("cuda", 0)
    assert resolve("auto", gpu) == resolve("cuda", gpu) == "cuda"
    with pytest.raises(BackendError, match=r"'cpu' on device 'cuda'; expected device 'cpu'"):
        resolve("cpu", gpu)
    with pytest.raises(BackendError, match=r"'cuda' on device 'cpu'; expected device 'cuda'"):
        resolve("cuda", CPU)
    tensors = named()
    with pytest.raises(BackendError, match="A on cuda:0 with x on cpu"):
        dispatch(*(tensors | {"A": tensors["A"].to(gpu)}).values())


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match=f"scan backend 'tpu'.*one of {', '.join(SCAN_BACKENDS)}"):
        dispatch(*inputs(*SIZE), backend="tpu")


def test_cuda_on_a_cpu_is_refused_with_the_remedy() -> None:
    reason = cuda.unavailable()
    remedy = "move the model there" if reason is None else reason
    with pytest.raises(BackendError) as caught:
        dispatch(*inputs(*SIZE), backend="cuda")
    assert remedy in caught.value.remedy
    assert 'backend="reference"' in caught.value.remedy


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_device_without_a_kernel_never_gets_the_reference(backend: str) -> None:
    meta = tuple(tensor.to("meta") for tensor in inputs(*SIZE))
    with pytest.raises(BackendError, match=f"scan backend '{backend}' on device 'meta'"):
        dispatch(*meta, backend=backend)


def test_status_and_description() -> None:
    found = status()
    assert list(found) == ["cuda", "cpu", "mamba_ssm", "reference"]
    assert found["cpu"] is None
    assert found["reference"] is None
    assert found["cuda"] == cuda.unavailable()
    assert found["mamba_ssm"] == mamba_ssm.unavailable()
    assert describe("reference") == "plain PyTorch, slow"
    assert describe("cpu").endswith("1 thread")


def test_without_the_library_the_error_says_how_to_build_it(root: Path, tmp_path: Path) -> None:
    """A copy of the package as it is before it is built, in a process of its own."""
    unbuilt = shutil.ignore_patterns("_scan2d.so", "__pycache__")
    shutil.copytree(root / "mambamic", tmp_path / "mambamic", ignore=unbuilt)
    script = (
        "import mambamic, torch\n"
        "from mambamic.kernels import selective_scan_2d, status\n"
        f"assert mambamic.__file__.startswith({str(tmp_path)!r}), mambamic.__file__\n"
        "shapes = (1, 2, 2, 3), (1, 2, 2, 4, 5), (4, 3, 1), (4, 3), (4, 3, 2), (4, 3)\n"
        "inputs = [-torch.ones(shape) for shape in shapes]\n"
        "print(status()['cpu'])\n"
        "for backend in ('auto', 'cpu', 'reference'):\n"
        "    try:\n"
        "        print(tuple(selective_scan_2d(*inputs, backend=backend).shape))\n"
        "    except mambamic.errors.BackendError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reason = "the native library _scan2d.so was not built; run `pip install -e .` in the "
    told, auto, cpu, slow = done.stdout.splitlines()
    assert told.startswith(reason)
    assert auto == cpu
    assert cpu.startswith("scan backend 'cpu' is not available here; expected its native kernel; ")
    assert told in cpu
    assert slow == "(1, 2, 2, 3)"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dimension", [-1, -2])
def test_a_wrong_shape_is_named(name: str, dimension: int, backend: str) -> None:
    tensors = named()
    tensors[name] = tensors[name].narrow(dimension, 0, 1)
    with pytest.raises(ShapeError, match=rf"\b{name} of ") as caught:
        dispatch(*tensors.values(), backend=backend)
    assert str(tuple(tensors[name].shape)) in caught.value.problem


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_number_of_dimensions_is_named(name: str) -> None:
    tensors = named()
    tensors[name] = tensors[name][0]
    with pytest.raises(ShapeError, match=rf"\b{name}\b.*expected"):
        dispatch(*tensors.values())


def test_three_directions_are_refused() -> None:
    x, projections, *parameters = inputs(*SIZE)
    with pytest.raises(ShapeError, match=r"dt_weight of shape \(3, 8, 2\)"):
        dispatch(x, projections[..., :3, :], *(parameter[:3] for parameter in parameters))


def test_gradients_agree_with_the_reference() -> None:
    y, expected, grad_y = exact(inputs(*SIZE))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs(*SIZE)]
    found = dispatch(*leaves)
    assert error(found.detach(), y) < TOLERANCE[torch.float32]
    for name, grad, right in zip(NAMES, torch.autograd.grad(found, leaves, grad_y), expected,
                                 strict=True):  # fmt: skip
        assert error(grad, right) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_one_input_alone(name: str) -> None:
    expected = exact(inputs(*SIZE))
    tensors = {key: tensor.clone() for key, tensor in named().items()}
    tensors[name].requires_grad_()
    dispatch(*tensors.values()).backward(expected[2])
    grad = tensors[name].grad
    assert grad is not None
    assert error(grad, expected[1][NAMES.index(name)]) < TOLERANCE[torch.float32]
    assert all(tensor.grad is None for key, tensor in tensors.items() if key != name)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs(*SIZE)]
    grads = torch.autograd.grad(dispatch(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grads[0].sum(), leaves[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Image and projections as autocast leaves them, parameters in float32."""
    x, projections, *parameters = inputs(*SIZE)
    mixed = (x.to(dtype), projections.to(dtype), *parameters)
    y, expected, grad_y = exact(mixed)
    leaves = [tensor.clone().requires_grad_() for tensor in mixed]
    found = dispatch(*leaves)
    assert found.dtype == dtype
    assert error(found.detach(), y) < TOLERANCE[dtype]
    found.backward(grad_y.to(dtype))
    for name, leaf, right in zip(NAMES, leaves, expected, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        # The gradient that arrives is rounded as well.
        assert error(leaf.grad, right) < 2 * TOLERANCE[dtype], name


class Recorder(TorchDispatchMode):
    """Note how the scan's operator is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, bool]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.mambamic.selective_scan_2d.default:
            self.calls.append((args[6], args[7]))
        return func(*args, **(kwargs or {}))


def test_states_are_kept_only_for_a_gradient() -> None:
    tensors = [tensor.clone() for tensor in inputs(*SIZE)]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with Recorder() as recorder:
        dispatch(*tensors)
        with torch.no_grad():
            dispatch(*leaves)
        with torch.inference_mode():
            dispatch(*leaves)
        dispatch(*leaves)
        dispatch(*[*tensors[:-1], leaves[-1]])
    assert recorder.calls == [("cpu", keep) for keep in (False, False, False, True, True)]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors]
        assert scan._scan(*fake, "cuda", False)[1].shape == (0,)
        assert scan._scan(*fake, "cuda", True)[1].shape == cuda.states_shape(tensors[0], tensors[4])


@pytest.mark.parametrize("tracked", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_the_operators_keep_what_they_promise(tracked: bool, strided: bool) -> None:
    x, projections, *parameters = inputs(2, 3, 5, 4, 2, 3)
    if strided:
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        projections = torch.cat([projections, projections], -1)[..., : projections.shape[-1]]
    tensors = [tensor.detach().requires_grad_(tracked) for tensor in (x, projections, *parameters)]
    torch.library.opcheck(scan._scan, (*tensors, "cpu", tracked))
    if not tracked:
        grad = torch.ones_like(tensors[0])
        arguments = (grad, *tensors, tensors[0].new_empty(0), "cpu")
        torch.library.opcheck(scan._scan_backward, arguments)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("mambamic_t", 3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shallow() -> torch.nn.Module:
    """One block per stage: every kind and width of layer, for the compilers, which are slow."""
    config = MambaMICConfig(depths=(1, 1, 1, 1), dims=(96, 192, 384, 768))
    return MambaMIC(config, 3).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_whole_model_in_inference_mode(model: torch.nn.Module, images: Tensor) -> None:
    expected = model(images)
    with torch.inference_mode():
        found = model(images)
    assert found.is_inference()
    assert torch.equal(found, expected)


def test_a_model_compiles_without_a_break(shallow: torch.nn.Module, images: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(shallow, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), shallow(images))


def test_a_compiled_scan_has_gradients() -> None:
    torch.compiler.reset()
    compiled = torch.compile(dispatch, backend="aot_eager", fullgraph=True)
    _, expected, grad_y = exact(inputs(*SIZE))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs(*SIZE)]
    compiled(*leaves).backward(grad_y)
    for name, leaf, right in zip(NAMES, leaves, expected, strict=True):
        assert leaf.grad is not None
        assert error(leaf.grad, right) < TOLERANCE[torch.float32], name


def test_a_model_exports_for_any_batch(shallow: torch.nn.Module, images: Tensor) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(shallow, (images,), dynamic_shapes=({0: batch},))
    more = torch.cat([images, images.flip(0), images])
    torch.testing.assert_close(program.module()(more), shallow(more))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "mambamic.selective_scan_2d.default" in names


def test_autocast(model: torch.nn.Module, images: Tensor) -> None:
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16), Recorder() as recorder:
        found = model(images)
    assert recorder.calls
    assert {backend for backend, _ in recorder.calls} == {"cpu"}
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_model_on_the_reference_agrees(images: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("mambamic_t", 3).eval().requires_grad_(False)
    expected = model(images)
    set_scan_backend(model, "reference")
    with Recorder() as recorder:
        found = model(images)
    assert recorder.calls == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
