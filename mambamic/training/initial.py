"""Starting from the weights of a checkpoint instead of random ones."""

from __future__ import annotations

from torch import nn

from mambamic.checkpoint import Checkpoint
from mambamic.config import Config
from mambamic.errors import UsageError
from mambamic.models.registry import load_exactly

_HEAD = "head."


def check_initial(checkpoint: Checkpoint, architecture: str) -> None:
    """Refuse a checkpoint of another architecture.

    Raises:
        UsageError: It is one.
    """
    found = checkpoint.config.architecture
    if found != architecture:
        raise UsageError(
            f"{checkpoint.path} is a {found}",
            f"a checkpoint of {architecture}",
            f"use --arch {found}, or start from another checkpoint",
        )


def start_from(
    model: nn.Module, checkpoint: Checkpoint, classes: tuple[str, ...], head: str
) -> None:
    """Load a checkpoint's weights, all but the head where that told other classes apart.

    Args:
        model: Freshly initialised, of the checkpoint's architecture.
        checkpoint: Where to start.
        classes: What the model is to tell apart, in order.
        head: ``softmax`` or ``sigmoid``.

    Raises:
        CheckpointError: The weights are damaged.
    """
    state, before = checkpoint.state_dict(), checkpoint.config
    if not _same_head(before, classes, head):
        fresh = model.state_dict()
        state = {key: fresh[key] if key.startswith(_HEAD) else state[key] for key in state}
    load_exactly(model, state, what=f"{checkpoint.path} does not fit {before.architecture}")


def head_of(before: Config, classes: tuple[str, ...], head: str) -> str:
    """Return in words what becomes of the head of a checkpoint that ``start_from`` loads."""
    if _same_head(before, classes, head):
        return f"with its head of {len(classes)} classes"
    return f"with a new head: it had {len(before.classes)} other classes, now {len(classes)}"


def _same_head(before: Config, classes: tuple[str, ...], head: str) -> bool:
    return (before.classes, before.head) == (classes, head)
