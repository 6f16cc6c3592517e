"""Throughput and latency, through the library as users call it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mambamic.benchmark import inference
from mambamic.benchmark.timing import Timing
from mambamic.checkpoint import load_checkpoint
from mambamic.classifier import Classifier

ONCE = Timing(warmup=1, repeats=2)


def test_a_variant_gets_random_weights_and_a_folder_is_taken(tmp_path: Path) -> None:
    made = inference.checkpoint_of("medmamba_t", tmp_path)
    again = inference.checkpoint_of("medmamba_t", tmp_path / "again")
    config = load_checkpoint(made).config
    assert (config.architecture, config.input_size) == ("medmamba_t", 224)
    assert config.weights_sha256 == load_checkpoint(again).config.weights_sha256
    assert inference.checkpoint_of(str(made), tmp_path) == made


def test_on_a_cpu(random_checkpoint: Path) -> None:
    classifier = inference.load(random_checkpoint, "cpu", "auto", "auto", 2)
    row = inference.throughput(classifier, ONCE)
    alone = inference.latency(classifier, ONCE)
    assert row["batch"] == row["images_per_call"] == 2
    assert row["images_per_second"] == pytest.approx(2e3 / row["ms_per_call"], rel=0.01, abs=0.01)
    assert alone["runs"] == 20
    assert 0 < alone["p50_ms"] <= alone["p99_ms"]


def test_pixels_are_random_and_fill_the_batch(random_checkpoint: Path) -> None:
    classifier = Classifier.load(random_checkpoint, "cpu")
    pixels = inference.pinned_pixels(classifier, 3)
    assert pixels.shape == (3, 64, 64, 3)
    assert pixels.dtype == np.uint8
    assert 100 < pixels.mean() < 155
    assert not np.array_equal(pixels[0], pixels[1])


@pytest.mark.gpu
def test_pixels_are_pinned_and_a_stream_is_several_batches(random_checkpoint: Path) -> None:
    classifier = inference.load(random_checkpoint, "cuda", "auto", "auto", 32)
    pixels = inference.pinned_pixels(classifier, 3)
    assert torch.from_numpy(pixels).is_pinned()
    assert torch.from_numpy(pixels[1:]).is_pinned()
    row = inference.throughput(classifier, ONCE)
    assert (row["batch"], row["images_per_call"]) == (32, 256)
