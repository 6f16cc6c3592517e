"""The fused graph on the GPU against the plain module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mambamic.errors import ShapeError
from mambamic.graph.fold import inverse
from mambamic.graph.gpu import GpuGraph, _Place
from mambamic.graph.plain import forward
from mambamic.models import VARIANTS, create_model
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba

from .golden_fill import image_for
from .test_models import CASES, golden_model

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda:0")
SCALE, SHIFT = torch.tensor([0.016, 0.018, 0.015]), torch.tensor([-2.0, -1.8, -2.1])


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@torch.inference_mode()
def plain(model: MambaMIC | MedMamba, pixels: Tensor) -> Tensor:
    x = pixels.permute(0, 3, 1, 2) * SCALE.to(DEVICE).view(3, 1, 1)
    logits: Tensor = model(x + SHIFT.to(DEVICE).view(3, 1, 1))
    return logits


def as_pixels(image: Any) -> Tensor:
    """Bring an image of any range to what a camera gives."""
    low, high = image.min(), image.max()
    bytes_ = ((image - low) / (high - low) * 255).round().astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(bytes_.transpose(0, 2, 3, 1))).to(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tag"])
def test_agrees_on_every_golden_case(case: dict[str, Any]) -> None:
    model = golden_model(case, "auto", "cuda").eval()
    pixels = as_pixels(image_for(case["batch"], case["size"], case["seed"]))
    expected = plain(model, pixels)
    graph = GpuGraph(model, DEVICE, torch.float32, SCALE, SHIFT)
    assert (graph(pixels) - expected).abs().max() < 1e-4
    for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        logits = GpuGraph(model, DEVICE, dtype, SCALE, SHIFT)(pixels)
        assert (logits.softmax(1) - expected.softmax(1)).abs().max() < tolerance


@pytest.mark.parametrize("size", [(29, 29), (57, 57), (100, 100), (64, 96), (33, 45)])
@pytest.mark.parametrize("name", VARIANTS)
def test_any_size(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = create_model(name, 5).eval().to(DEVICE)
    graph = GpuGraph(model, DEVICE, torch.float32, SCALE, SHIFT)
    pixels = torch.randint(0, 256, (3, *size, 3), device=DEVICE).byte()
    if min(size) < model.minimum_size or (isinstance(model, MambaMIC) and size[0] != size[1]):
        with pytest.raises(ShapeError):
            graph(pixels)
    else:
        assert torch.allclose(graph(pixels), plain(model, pixels), atol=1e-4)


@pytest.mark.parametrize("name", ["mambamic_t", "medmamba_t"])
def test_is_deterministic(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 5).eval()
    graph = GpuGraph(model, DEVICE, torch.float16, SCALE, SHIFT)
    pixels = torch.randint(0, 256, (40, 224, 224, 3), device=DEVICE).byte()
    first = graph(pixels)
    for _ in range(3):
        torch.full((64 * 1024 * 1024,), float("nan"), device=DEVICE)  # poison what is reused
        assert torch.equal(graph(pixels), first)


@pytest.mark.parametrize("name", ["mambamic_t", "medmamba_t"])
def test_sums_beyond_float16(name: str) -> None:
    """As a trained MedMamba has them in rare images: infinity would be no number in the norm."""
    torch.manual_seed(0)
    model = create_model(name, 5).eval().to(DEVICE)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("Ds"):
                parameter[0] = 1e7
    pixels = torch.randint(0, 256, (8, 160, 160, 3), device=DEVICE).byte()
    expected = plain(model, pixels).softmax(1)
    found = GpuGraph(model, DEVICE, torch.float16, SCALE, SHIFT)(pixels).softmax(1)
    assert (found - expected).abs().max() < 5e-3


@pytest.mark.parametrize("late", ["beside", "join"])
@pytest.mark.parametrize("name", ["mambamic_t", "medmamba_t"])
def test_branches_share_no_memory(name: str, late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of a block's two branches is the later one."""
    torch.manual_seed(0)
    model = create_model(name, 5).eval()
    graph = GpuGraph(model, DEVICE, torch.float32, SCALE, SHIFT)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), device=DEVICE).byte()
    expected = graph(pixels)
    before = getattr(_Place, late)

    def join(place: _Place) -> None:
        torch.cuda._sleep(10_000_000)  # clock ticks, 5 ms; the branch beside has long ended
        before(place)

    @contextmanager
    def beside(place: _Place) -> Iterator[None]:
        with before(place):
            torch.cuda._sleep(10_000_000)
            yield

    monkeypatch.setattr(_Place, late, {"beside": beside, "join": join}[late])
    for _ in range(3):
        assert torch.equal(graph(pixels), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_features_are_what_the_head_sees(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 5).eval().to(DEVICE)
    graph = GpuGraph(model, DEVICE, torch.float32, SCALE, SHIFT)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), device=DEVICE).byte()
    logits, features = graph.outputs(pixels)
    assert torch.equal(logits, graph(pixels))
    assert features.dtype == torch.float32
    with torch.inference_mode():
        x = pixels.permute(0, 3, 1, 2) * SCALE.to(DEVICE).view(3, 1, 1)
        expected = forward(model, x + SHIFT.to(DEVICE).view(3, 1, 1)).features
    assert torch.allclose(features[:, inverse(graph.out_order)], expected, atol=1e-4)
