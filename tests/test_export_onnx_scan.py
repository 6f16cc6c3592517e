"""The exported scan against the reference, and that nothing in it can overflow."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mambamic.export.onnx_graph import Graph
from mambamic.export.onnx_layers import GatedScan
from mambamic.export.onnx_scan import DOMAIN, OPSET, block_length, selective_scan
from mambamic.graph.fold import ConvWeights, StateSpaceWeights
from mambamic.kernels import reference

RANK, STATES = 2, 16


def weights(inner: int, *, fast: float = 1.0) -> StateSpaceWeights:
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return StateSpaceWeights(
        in_proj=normal(2 * inner, inner // 2),
        conv=ConvWeights(normal(inner, 1, 3, 3), normal(inner)),
        x_proj=normal(4, RANK + 2 * STATES, inner) * inner**-0.5,
        dt_weight=normal(4, inner, RANK) * fast,
        dt_bias=normal(4, inner) - 3,
        A=-torch.exp(normal(4, inner, STATES) + 1) * fast,
        skip=normal(4, inner),
        norm=(normal(inner), normal(inner)),
    )


def exported(scan: StateSpaceWeights, groups: int, height: int, width: int) -> onnx.ModelProto:
    graph = Graph()
    graph.name(GatedScan(scan, groups)._scan(graph, "x", height, width), "y")
    channels = groups * len(scan.norm[0])
    shape: list[str | int | None] = [height * width, "batch", channels]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "scan", values[:1], values[1:], graph.constants),
        functions=[selective_scan()],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def expected(scan: StateSpaceWeights, x: Tensor, groups: int, height: int, width: int) -> Tensor:
    """Run the reference: (L, B, groups * D) to the same."""
    batch, inner = x.shape[1], len(scan.norm[0])
    image = x.view(height, width, batch * groups, inner).permute(2, 0, 1, 3).double()
    projections = torch.einsum("bhwd,kpd->bhwkp", image, scan.x_proj.double())
    y = reference.selective_scan_2d(
        image, projections, scan.dt_weight, scan.dt_bias, scan.A, scan.skip
    )
    return y.permute(1, 2, 0, 3).reshape(x.shape).float()


@pytest.mark.parametrize(
    ("groups", "inner", "height", "width"),
    [(4, 24, 8, 8), (4, 96, 7, 7), (1, 40, 1, 1), (1, 96, 5, 13), (4, 48, 14, 14)],
)
def test_agrees_with_the_reference(groups: int, inner: int, height: int, width: int) -> None:
    scan = weights(inner)
    session = onnxruntime.InferenceSession(
        exported(scan, groups, height, width).SerializeToString()
    )
    for batch in (1, 3):
        x = torch.randn(
            height * width, batch, groups * inner, generator=torch.Generator().manual_seed(batch)
        )
        y = session.run(None, {"x": x.numpy()})[0]
        reached = expected(scan, x, groups, height, width)
        assert np.abs(y - reached.numpy()).max() < 2e-5 * float(reached.abs().max())


def test_steps_of_any_size_give_numbers() -> None:
    # Steps from 1e-40 to thousands, decays down to nothing: a ratio of decays would overflow.
    scan = weights(16, fast=300.0)
    x = torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(0)) * 3
    session = onnxruntime.InferenceSession(exported(scan, 1, 8, 8).SerializeToString())
    y = session.run(None, {"x": x.numpy()})[0]
    reached = expected(scan, x, 1, 8, 8)
    assert np.isfinite(y).all()
    assert np.abs(y - reached.numpy()).max() < 1e-4 * float(reached.abs().max())


@pytest.mark.parametrize(("length", "lanes"), [(3136, 6144), (49, 49152), (61 * 61, 6144), (1, 16)])
def test_blocks_divide_the_sequence(length: int, lanes: int) -> None:
    assert length % block_length(length, lanes) == 0


def test_blocks_of_a_usual_map_fit_the_cache() -> None:
    assert block_length(3136, 6144) * 6144 == pytest.approx(98304, rel=0.2)
