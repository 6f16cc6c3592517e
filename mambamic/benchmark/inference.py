"""Throughput and latency: from uint8 pixels on the host to probabilities on the host."""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambamic.benchmark.timing import Timing, host_ms, percentile
from mambamic.checkpoint import save_checkpoint
from mambamic.classifier import Classifier
from mambamic.config import Config
from mambamic.models import create_model
from mambamic.models.registry import VARIANTS
from mambamic.preprocess import Pixels

_CLASSES = tuple(f"class_{index}" for index in range(8))
# Batches that are given to the classifier at once, for it to overlap their copies: a stream.
_STREAM = {"cuda": 8, "cpu": 1}
_RUNS_FOR_P99 = 10  # times the repeats


def random_checkpoint(variant: str, folder: Path) -> Path:
    """Write a checkpoint with random weights: what is timed does not depend on them.

    Args:
        variant: A name in ``VARIANTS``.
        folder: Where the checkpoint's folder is made.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(variant, len(_CLASSES))
    config = Config(variant, _CLASSES)
    return save_checkpoint(folder / variant, config, model.state_dict(), "# Random weights\n").path


def checkpoint_of(model: str, folder: Path) -> Path:
    """Return the checkpoint that a user's ``model``, a variant's name or a folder, stands for."""
    return random_checkpoint(model, folder) if model in VARIANTS else Path(model)


def load(checkpoint: Path, device: str, backend: str, dtype: str, max_batch: int) -> Classifier:
    """Load a classifier, once what an earlier one held on the device is free again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Classifier.load(checkpoint, device, backend, dtype, max_batch=max_batch)


def pinned_pixels(classifier: Classifier, count: int) -> Pixels:
    """Return (count, S, S, 3) random pixels, in memory that a GPU copies from by itself."""
    size = classifier.config.input_size
    shape = (count, size, size, 3)
    memory = torch.empty(shape, dtype=torch.uint8, pin_memory=classifier.device.type == "cuda")
    pixels: Pixels = memory.numpy()
    pixels[:] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return pixels


def throughput(classifier: Classifier, timing: Timing) -> dict[str, Any]:
    """Time a stream of batches of the classifier's ``max_batch``, given to it at once."""
    batch = classifier.max_batch
    images = batch * _STREAM[classifier.device.type]
    pixels = pinned_pixels(classifier, images)
    median = statistics.median(host_ms(lambda: classifier.probabilities(pixels), timing))
    return {
        "batch": batch,
        "images_per_call": images,
        "ms_per_call": round(median, 3),
        "images_per_second": round(images / median * 1e3, 2),
    }


def latency(classifier: Classifier, timing: Timing) -> dict[str, Any]:
    """Time one image by itself, often enough for a 99th percentile."""
    pixels = pinned_pixels(classifier, 1)
    often = replace(timing, repeats=_RUNS_FOR_P99 * timing.repeats)
    times = host_ms(lambda: classifier.probabilities(pixels), often)
    return {
        "batch": 1,
        "runs": len(times),
        "p50_ms": round(percentile(times, 0.5), 3),
        "p99_ms": round(percentile(times, 0.99), 3),
    }
