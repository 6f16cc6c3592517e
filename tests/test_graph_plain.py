from __future__ import annotations

import pytest
import torch

from mambamic.errors import ShapeError
from mambamic.graph.plain import forward
from mambamic.models import create_model


@pytest.mark.parametrize("name", ["mambamic_t", "medmamba_t"])
def test_the_logits_are_the_modules_and_each_stage_has_its_map(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, 3).eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    for stage, side in enumerate((16, 8, 4, 2), 1):
        run = forward(model, x, stage)
        assert torch.equal(run.logits, expected)
        assert torch.equal(model.head(run.features), expected)
        assert run.feature_map.shape == (2, side, side, 96 * 2 ** (stage - 1))
    assert torch.allclose(run.feature_map.mean(dim=(1, 2)), run.features)


def test_shapes_are_checked_as_the_module_does() -> None:
    with pytest.raises(ShapeError, match="square"):
        forward(create_model("mambamic_t", 3).eval(), torch.randn(1, 3, 64, 96))
    with pytest.raises(ShapeError, match="32 x 32"):
        forward(create_model("medmamba_t", 3).eval(), torch.randn(1, 3, 30, 30))
