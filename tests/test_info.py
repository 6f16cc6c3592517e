"""Counts of the networks: those that were published, and sums that can be done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambamic import create_model
from mambamic.benchmark.floors import count
from mambamic.errors import ShapeError
from mambamic.info import examine, lines


@pytest.mark.parametrize(
    ("variant", "classes", "published", "used"),
    [
        ("mambamic_t", 1000, 4_321_310, 3_795_902),
        ("mambamic_s", 1000, 4_971_714, 4_279_650),
        ("mambamic_b", 8, 8_388_778, 6_863_658),
    ],
)
def test_published_counts(variant: str, classes: int, published: int, used: int) -> None:
    info = examine(create_model(variant, classes), 32)
    assert (info.parameters_published, info.parameters) == (published, used)
    assert sum(part.parameters for part in info.parts) == used
    text = "\n".join(lines(info, variant))
    assert f"{used:,} used; {published:,} as published, {published - used:,} of which" in text


@pytest.mark.parametrize("variant", ["mambamic_t", "medmamba_t"])
def test_parts_add_up_to_the_whole(variant: str) -> None:
    model = create_model(variant, 8)
    info = examine(model, 64)
    work = count(model.eval(), torch.zeros(1, 3, 64, 64))
    assert info.multiply_adds * 2 == work.flops
    assert info.state_updates == work.state_updates
    assert [part.name for part in info.parts] == [
        "stem", "stage 1", "stage 2", "stage 3", "stage 4", "head",
    ]  # fmt: skip
    shapes = [part.output for part in info.parts]
    assert shapes == [(16, 16, 96), (8, 8, 192), (4, 4, 384), (2, 2, 768), (768,), (8,)]
    assert [part.output_bytes for part in info.parts[:2]] == [16 * 16 * 96 * 4, 8 * 8 * 192 * 4]
    assert info.parts[-1].multiply_adds == 768 * 8
    assert info.as_json()["multiply_adds"] == info.multiply_adds


def test_a_network_without_unused_tensors() -> None:
    info = examine(create_model("medmamba_t", 1000), 32)
    assert info.parameters_published == info.parameters
    assert "as published" not in "\n".join(lines(info, "medmamba_t"))


def test_memory_for_training_is_what_autograd_keeps() -> None:
    model = create_model("medmamba_t", 8)
    small, large = examine(model, 64), examine(model, 128)
    for part, larger in zip(small.parts[:4], large.parts[:4], strict=True):
        # Four times the positions; stochastic depth keeps a number per image.
        assert larger.training_bytes == pytest.approx(4 * part.training_bytes, abs=64)
    # The embedding keeps at least the image, of three channels, and what it passes on.
    stem = small.parts[0]
    assert stem.training_bytes >= 3 * 64 * 64 * 4 + stem.output_bytes
    head = small.parts[-1]
    assert head.training_bytes == 768 * 4  # its input; the weights are there anyhow


def test_the_model_and_the_random_numbers_are_left_alone() -> None:
    model = create_model("mambamic_t", 8)

    def state() -> list[Tensor]:
        return [tensor.clone() for tensor in model.state_dict().values()]

    before, random = state(), torch.get_rng_state()
    examine(model, 32)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training


def test_an_input_that_is_too_small() -> None:
    with pytest.raises(ShapeError, match="at least 29 x 29"):
        examine(create_model("mambamic_t", 8), 28)
