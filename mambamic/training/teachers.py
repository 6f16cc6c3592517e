"""Trained networks that a new one learns from: distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mambamic.checkpoint import Checkpoint
from mambamic.engine import TorchEngine
from mambamic.errors import UsageError
from mambamic.training.loss import accuracy


class Teachers:
    """What trained networks together make of images.

    They see what the learner sees, after the augmentation: their answers then tell something new
    in every epoch (Beyer and others 2022, "a good teacher is patient and consistent").

    Args:
        checkpoints: At least one.
        classes: Of the learner, in order.
        head: Of the learner, ``softmax`` or ``sigmoid``.
        device: Where they compute, ``cpu`` or ``cuda:N``.

    Raises:
        UsageError: A checkpoint tells other classes apart, or in another way.
        CheckpointError: The weights are damaged.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], classes: tuple[str, ...], head: str, device: str
    ) -> None:
        for checkpoint in checkpoints:
            _check(checkpoint, classes, head)
        self._softmax = head == "softmax"
        self._orders = [
            torch.tensor([c.config.classes.index(name) for name in classes], device=device)
            for c in checkpoints
        ]
        engines = [TorchEngine(c, device, "auto", "auto", None) for c in checkpoints]
        self._networks = [engine.network for engine in engines]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the mean of their probabilities, (B, C), of (B, S, S, 3) uint8 pixels."""
        # Their networks have a precision of their own, which a learner's must not reach into.
        with torch.inference_mode(), torch.autocast(pixels.device.type, enabled=False):
            found = [
                self._chances(network(pixels)[0])[:, order]
                for network, order in zip(self._networks, self._orders, strict=True)
            ]
            mean = torch.stack(found).mean(0)
        return mean.clone()  # one that a loss may take

    def accuracy(self, pixels: Tensor, labels: Tensor, batch: int = 256) -> float:
        """Return the share of (N, S, S, 3) images that they get right."""
        found = [self(part) for part in pixels.split(batch)]
        return float(accuracy(torch.cat(found).logit(), labels))

    def _chances(self, logits: Tensor) -> Tensor:
        # As trained, without the temperature: what a wrong class has over another is to be seen.
        return logits.softmax(1) if self._softmax else logits.sigmoid()


def _check(checkpoint: Checkpoint, classes: tuple[str, ...], head: str) -> None:
    found = checkpoint.config
    if set(found.classes) != set(classes) or found.head != head:
        raise UsageError(
            f"{checkpoint.path} tells {', '.join(found.classes)} ({found.head}) apart",
            f"a teacher of {', '.join(classes)} ({head})",
            "name other --teachers, or train on the images that they know",
        )
