"""A checkpoint with random weights, for tests that need a model and not its knowledge."""

from __future__ import annotations

from pathlib import Path

import torch

from mambamic import create_model
from mambamic.checkpoint import save_checkpoint
from mambamic.config import Config

CLASSES = ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")


def write_random_checkpoint(folder: Path, *, input_size: int = 64) -> Path:
    """Write a MambaMIC-T with seeded random weights and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("mambamic_t", len(CLASSES))
    config = Config("mambamic_t", CLASSES, input_size=input_size)
    save_checkpoint(folder, config, model.state_dict(), "# Random weights\n")
    return folder
