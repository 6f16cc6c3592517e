"""The CPU's inference graph against the published code's results and against the plain module."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.errors import BackendError, ShapeError, UsageError
from mambamic.graph import cpu as graph_cpu
from mambamic.graph.cpu import CpuGraph
from mambamic.graph.cpu_layers import Layout, Matrix, edge_biases
from mambamic.graph.cpu_steps import Step
from mambamic.graph.fold import ConvWeights, inverse
from mambamic.graph.plain import forward
from mambamic.kernels import cpu
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba

from .golden_fill import image_for
from .test_models import CASES, golden_model, outputs

FAMILIES = ("mambamic", "medmamba")
TOLERANCE = 1e-4


@functools.cache
def model(family: str) -> MambaMIC | MedMamba:
    """The smallest variant with weights as the golden files have them."""
    case = next(case for case in CASES if case["tag"].startswith(f"{family}_t"))
    return golden_model(case, "cpu", "cpu").requires_grad_(False)


@functools.cache
def graph(family: str) -> CpuGraph:
    return CpuGraph(model(family))


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=random)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("level", cpu.available_levels())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tag"])
def test_agrees_with_the_published_code(
    case: dict[str, Any], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
    found = CpuGraph(golden_model(case, "cpu", "cpu")).normalised(
        torch.from_numpy(image_for(case["batch"], case["size"], case["seed"]))
    )
    assert error(found, torch.from_numpy(outputs()[f"{case['tag']}/logits"])) < TOLERANCE


def in_bfloat16(network: MambaMIC | MedMamba) -> CpuGraph | None:
    """Return the graph; on a processor without AMX, None after the refusal that is due there."""
    if cpu.has_bfloat16():
        return CpuGraph(network, torch.bfloat16)
    with pytest.raises(BackendError, match=r"bfloat16.*AMX.*use float32"):
        CpuGraph(network, torch.bfloat16)
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tag"])
def test_bfloat16_keeps_the_probabilities(case: dict[str, Any]) -> None:
    half = in_bfloat16(golden_model(case, "cpu", "cpu"))
    if half is None:
        return
    x = torch.from_numpy(image_for(case["batch"], case["size"], case["seed"]))
    found = half.normalised(x)
    expected = torch.from_numpy(outputs()[f"{case['tag']}/logits"])
    assert found.dtype == torch.float32
    assert error(found.softmax(1), expected.softmax(1)) < 3e-2
    # Rounded indeed, and not by more than a few of its 2^-8.
    assert 1e-5 < error(found, expected) < 3e-2
    assert torch.equal(torch.cat([half.normalised(image[None]) for image in x]), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_at_any_size_and_on_any_threads(family: str) -> None:
    half = in_bfloat16(model(family))
    if half is None:
        return
    work = [images(1, size, size, seed) for seed, size in enumerate((33, 57, 64, 96) * 2)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(half.normalised, work))
    for x, logits in zip(work, found, strict=True):
        assert error(logits.softmax(1), graph(family).normalised(x).softmax(1)) < 3e-2


def test_bfloat16_is_refused_where_it_would_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, cpu.LEVELS[0])
    with pytest.raises(BackendError, match=r"bfloat16.*AMX.*use float32"):
        CpuGraph(model("mambamic"), torch.bfloat16)
    with pytest.raises(UsageError, match="float16"):
        CpuGraph(model("mambamic"), torch.float16)


@pytest.mark.parametrize(
    ("family", "height", "width"),
    [
        *(("mambamic", size, size) for size in (29, 32, 33, 57, 61, 64, 96, 224)),
        *(("medmamba", *size) for size in ((32, 32), (33, 63), (75, 32), (64, 97), (224, 224))),
    ],
)
def test_agrees_with_the_plain_module_at_any_size(family: str, height: int, width: int) -> None:
    x = images(2, height, width)
    with torch.inference_mode():
        expected = model(family)(x)
    assert error(graph(family).normalised(x), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2, 3, 31, 32, 33])
def test_a_batch_gives_what_its_images_give(family: str, batch: int) -> None:
    x = images(batch, 33, 33)
    together = graph(family).normalised(x)
    assert together.shape == (batch, model(family).head.out_features)
    alone = [graph(family).normalised(image[None]) for image in x]
    assert torch.equal(together, torch.cat(alone))
    with torch.inference_mode():
        assert error(together, model(family)(x)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_normalised(family: str) -> None:
    random = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (3, 40, 40, 3), dtype=torch.uint8, generator=random)
    scale, shift = torch.tensor([0.01, 0.02, 0.015]), torch.tensor([-1.0, -2.0, -1.5])
    found = graph(family)(pixels, scale, shift)
    assert found.dtype == torch.float32
    x = pixels.permute(0, 3, 1, 2) * scale.view(3, 1, 1) + shift.view(3, 1, 1)
    assert error(found, graph(family).normalised(x)) < 1e-5
    strided = pixels.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert not strided.is_contiguous()
    assert torch.equal(graph(family)(strided, scale, shift), found)
    assert graph(family)(pixels[:0], scale, shift).shape == (0, found.shape[1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("own_threads", [False, True], ids=["openmp", "own"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_threads(
    family: str, own_threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where threads are more than groups of channels, the scan is divided among them otherwise."""
    if own_threads:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    x, results = images(1, 64, 64), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(CpuGraph(model(family)).normalised(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_that_share_a_graph_get_their_own_results(family: str) -> None:
    shared = CpuGraph(model(family))
    work = [images(1, size, size, seed) for seed, size in enumerate((64, 64, 40, 64, 33, 64) * 4)]
    expected = [graph(family).normalised(x) for x in work]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(shared.normalised, work))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow(family: str) -> None:
    shared = CpuGraph(model(family))
    sizes = (33, 40, 48, 56, 64, 72, 80)
    for size in sizes:
        shared.normalised(images(1, size, size))
    before = _resident_bytes()
    for repeat in range(25):
        for size in sizes:
            shared.normalised(images(1, size, size, repeat))
    assert len(shared._idle) == graph_cpu._IDLE
    assert _resident_bytes() - before < 16 << 20


@pytest.mark.parametrize("family", FAMILIES)
def test_later_changes_of_the_environment_do_not_reach_packed_weights(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(1, 40, 40)
    expected = graph(family).normalised(x)
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, cpu.LEVELS[0])
    assert torch.equal(graph(family).normalised(x), expected)


def test_nan_is_not_hidden() -> None:
    for family in FAMILIES:
        x = images(1, 64, 64)
        x[0, 1, 30, 30] = float("nan")
        assert graph(family).normalised(x).isnan().all()


def test_what_the_graph_cannot_take_is_refused() -> None:
    affine = (torch.ones(3), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"\(1, 3, 64, 96\).*square"):
        graph("mambamic").normalised(images(1, 64, 96))
    with pytest.raises(ShapeError, match="at least 29 x 29"):
        graph("mambamic").normalised(images(1, 28, 28))
    with pytest.raises(ShapeError, match="at least 32 x 32"):
        graph("medmamba").normalised(images(1, 64, 31))
    with pytest.raises(ShapeError, match=r"\(B, H, W, 3\)"):
        graph("medmamba")(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), *affine)
    with pytest.raises(UsageError, match="uint8"):
        graph("medmamba")(torch.zeros(1, 64, 64, 3), *affine)


def test_without_the_right_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_LIBRARY", tmp_path / "missing.so")
        cpu._load.cache_clear()
        with pytest.raises(BackendError, match="pip install"):
            CpuGraph(model("mambamic"))
    cpu._load.cache_clear()

    with pytest.raises(BackendError, match=r"another version.*pip install"):
        cpu.run_steps(None, 0, ctypes.sizeof(Step) + 8, cpu.LEVELS[0])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 1), (2, 2), (5, 7)])
def test_a_shift_before_zero_padding_is_folded_exactly(height: int, width: int) -> None:
    random = torch.Generator().manual_seed(1)
    x, scale, shift = (torch.randn(shape, generator=random) for shape in ((6, height, width), 6, 6))
    conv = ConvWeights(torch.randn(6, 1, 3, 3, generator=random), torch.randn(6, generator=random))
    affine = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    expected = F.conv2d(affine, conv.weight, conv.bias, padding=1, groups=6)
    taps, biases = edge_biases(conv, scale, shift)
    kernel = taps.t().reshape(6, 1, 3, 3)
    found = F.conv2d(x, kernel, padding=1, groups=6)
    for row in range(height):
        for column in range(width):
            inside = (row > 0, row < height - 1, column > 0, column < width - 1)
            found[:, row, column] += biases[sum(bit << i for i, bit in enumerate(inside))]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_weights_are_packed_for_whole_vectors(lanes: int) -> None:
    weight, bias = torch.randn(21, 5), torch.randn(21)
    level = next(level for level in cpu.LEVELS if cpu.lanes(level) == lanes)
    packed = Matrix(weight, bias, Layout(level, torch.float32))
    assert packed.weight.shape == (-(-21 // lanes), 5, lanes)
    unpacked = packed.weight.transpose(1, 2).reshape(-1, 5)
    assert torch.equal(unpacked[:21], weight)
    assert torch.equal(packed.bias[:21], bias)
    assert not packed.half
    assert not unpacked[21:].any()
    assert not packed.bias[21:].any()


def test_bfloat16_weights_are_packed_in_pairs() -> None:
    weight = torch.randn(21, 45)
    packed = Matrix(weight, None, Layout(cpu.LEVELS[-1], torch.bfloat16))
    assert packed.half
    assert packed.weight.shape == (2, 2, 16, 16, 2)
    assert packed.weight.is_contiguous()
    unpacked = packed.weight.permute(0, 3, 1, 2, 4).reshape(32, 64)
    assert torch.equal(unpacked[:21, :45], weight.bfloat16())
    assert not unpacked[21:].any()
    assert not unpacked[:, 45:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_what_the_head_sees(family: str) -> None:
    pixels = torch.randint(0, 256, (5, 64, 64, 3), generator=torch.Generator().manual_seed(1))
    scale, shift = torch.full((3,), 0.016), torch.full((3,), -2.0)
    logits, features = graph(family).outputs(pixels.byte(), scale, shift)
    assert torch.equal(logits, graph(family)(pixels.byte(), scale, shift))
    with torch.inference_mode():
        x = pixels.permute(0, 3, 1, 2) * scale.view(3, 1, 1) + shift.view(3, 1, 1)
        expected = forward(model(family), x).features
    assert error(features[:, inverse(graph(family).out_order)], expected) < TOLERANCE
