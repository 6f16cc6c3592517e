"""Both networks against what the published code computes, and what they refuse."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mambamic.errors import CheckpointError, ShapeError, UsageError
from mambamic.models import VARIANTS, create_model, from_upstream, set_scan_backend
from mambamic.models.layers import StochasticDepth
from mambamic.models.mambamic import MambaMIC
from mambamic.models.medmamba import MedMamba
from tests.golden_fill import image_for, tensor_for

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "golden.json").read_text())
SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]


@cache
def outputs() -> dict[str, Any]:
    with np.load(GOLDEN / "golden.npz") as archive:
        return dict(archive)


def upstream_weights(case: dict[str, Any]) -> dict[str, Tensor]:
    shapes = SHAPES[f"{case['family']}_{case['variant']}"]
    weights = {}
    for key, shape in shapes.items():
        size = [case["num_classes"], *shape[1:]] if key.startswith("head.") else shape
        weights[key] = torch.from_numpy(np.asarray(tensor_for(key, tuple(size), case["seed"])))
    return weights


def golden_model(case: dict[str, Any], backend: str, device: str) -> MambaMIC | MedMamba:
    model = from_upstream(f"{case['family']}_{case['variant']}", upstream_weights(case))
    set_scan_backend(model, backend)
    return model.to(device)


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tag"])
def test_agrees_with_the_published_code(case: dict[str, Any], backend: str, device: str) -> None:
    tag, golden = case["tag"], outputs()
    model = golden_model(case, backend, device)
    image = image_for(case["batch"], case["size"], case["seed"])
    assert np.linalg.norm(image) == pytest.approx(case["input_l2"], rel=1e-6)
    seen: dict[str, Tensor] = {}
    named: list[tuple[str, torch.nn.Module]] = [("patch_embed", model.patch_embed)]
    named += [(f"stage{i + 1}", stage) for i, stage in enumerate(model.layers)]
    for name, module in named:
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    logits = model(torch.from_numpy(image).to(device))

    assert np.abs(logits.detach().cpu().numpy() - golden[f"{tag}/logits"]).max() < 1e-4
    stages = [name for name, _ in named if f"{tag}/{name}" in golden]
    assert len(stages) == (5 if case["size"] == 64 else 0)
    for name in stages:
        got = seen[name][0].detach().cpu().numpy()
        assert np.abs(got - golden[f"{tag}/{name}"]).max() < 1e-4, name
    if case.get("grad_norms"):
        check_gradients(case, model, logits)


def check_gradients(case: dict[str, Any], model: torch.nn.Module, logits: Tensor) -> None:
    generator = np.random.default_rng([case["seed"], 99])
    weight = torch.from_numpy(generator.normal(size=tuple(logits.shape)).astype(np.float32))
    (logits * weight.to(logits.device)).sum().backward()
    parameters = dict(model.named_parameters())
    used = {key: norm for key, norm in case["grad_norms"].items() if norm is not None}
    assert parameters.keys() == used.keys()
    for key, norm in used.items():
        grad = parameters[key].grad
        assert grad is not None
        assert float(grad.double().norm()) == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("name", VARIANTS)
def test_key_names_are_the_published_ones(name: str) -> None:
    ours = {key: list(value.shape) for key, value in create_model(name, 1000).state_dict().items()}
    unused = SHAPES[name].keys() - ours.keys()
    assert all("pvm_layer.proj." in key or "mamba.out_proj" in key for key in unused)
    assert ours == {key: shape for key, shape in SHAPES[name].items() if key not in unused}


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("mambamic_t", 1000, 3_795_902),
        ("mambamic_s", 1000, 4_279_650),
        ("mambamic_b", 8, 6_863_658),
    ],
)
def test_parameter_counts(name: str, classes: int, count: int) -> None:
    assert sum(p.numel() for p in create_model(name, classes).parameters()) == count


@pytest.mark.parametrize("name", VARIANTS)
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3)
    for key, value in model.state_dict().items():
        if key.endswith("A_logs"):
            assert torch.allclose(value.exp(), torch.arange(1.0, 17).expand_as(value))
        elif key.endswith("dt_projs_bias"):
            step = torch.nn.functional.softplus(value)
            assert step.min() > 0.99e-3
            assert step.max() < 0.101
        elif key.endswith("in_proj.weight"):
            assert value.std() == pytest.approx(0.02, rel=0.15)
    rates = [m.rate for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = StochasticDepth(0.25)
    dropped = layer(torch.ones(4000, 2, 2, 3))
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(4, 1, 1, 1)), torch.ones(4, 1, 1, 1))


def test_bad_input_is_refused_with_the_shape() -> None:
    mambamic, medmamba = create_model("mambamic_t", 2).eval(), create_model("medmamba_t", 2).eval()
    with pytest.raises(ShapeError, match=r"\(1, 3, 64, 96\).*square"):
        mambamic(torch.zeros(1, 3, 64, 96))
    with pytest.raises(ShapeError, match="at least 29 x 29"):
        mambamic(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ShapeError, match="at least 32 x 32"):
        medmamba(torch.zeros(1, 3, 64, 31))
    with pytest.raises(ShapeError, match=r"\(batch, 3, height, width\)"):
        medmamba(torch.zeros(1, 1, 64, 64))
    with torch.inference_mode():
        assert mambamic(torch.zeros(1, 3, 29, 29)).shape == (1, 2)
        assert medmamba(torch.zeros(1, 3, 32, 75)).shape == (1, 2)


def test_wrong_names_and_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="mambamic_x"):
        create_model("mambamic_x", 2)
    with pytest.raises(UsageError, match="num_classes 0"):
        create_model("mambamic_t", 0)
    weights = upstream_weights(CASES[0])
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        from_upstream("mambamic_t", {})
    with pytest.raises(CheckpointError, match="'surprise' is unknown"):
        from_upstream("mambamic_t", weights | {"surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"key '.*' has shape "):
        from_upstream("mambamic_b", weights)
    del weights["layers.0.blocks.0.pvm_layer.norm.weight"]
    with pytest.raises(CheckpointError, match=r"pvm_layer\.norm\.weight' is missing"):
        from_upstream("mambamic_t", weights)


def test_the_batch_does_not_change_a_result() -> None:
    model = golden_model(CASES[0], "cpu", "cpu")
    images = torch.from_numpy(image_for(3, 64, 5))
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
