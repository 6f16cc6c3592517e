"""A checkpoint with random weights, for tests that need a model and not its knowledge."""

from __future__ import annotations

from pathlib import Path

CLASSES = tuple("abcdefgh")


def write_random_checkpoint(
    folder: Path,
    *,
    input_size: int = 64,
    architecture: str = "mambamic_t",
    classes: tuple[str, ...] = CLASSES,
    head: str = "softmax",
) -> Path:
    """Write a model with seeded random weights and return its folder."""
    import torch

    from mambamic import create_model
    from mambamic.checkpoint import save_checkpoint
    from mambamic.config import Config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = create_model(architecture, len(classes))
        # Far from uniform probabilities, so that a wrong order or scale shows.
        model.head.weight.data.mul_(40)
    config = Config(architecture, classes, head=head, input_size=input_size)
    return save_checkpoint(folder, config, model.state_dict(), "# Random weights\n").path
