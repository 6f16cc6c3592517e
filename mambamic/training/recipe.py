"""What a training run is told, in one place."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mambamic.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; the defaults are those of the demo checkpoint.

    Args:
        epochs: Passes over the training images.
        warmup_epochs: Of these, with a rising learning rate.
        batch_size: Images per step.
        learning_rate: Of AdamW, at the end of the warm-up; it falls to 0 along a cosine.
        weight_decay: On matrices and kernels; norms, biases and state-space parameters have none.
        label_smoothing: Probability spread over all classes.
        clip_norm: The largest norm of the gradient.
        ema_decay: Per step, of the moving average of the weights that is validated and kept.
        seed: Of the initial weights, the order of the images and the augmentation.
    """

    epochs: int = 42
    warmup_epochs: int = 3
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        rules: dict[str, tuple[bool, str]] = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "warmup_epochs": (
                0 <= self.warmup_epochs < self.epochs,
                "from 0 to below the epochs",
            ),
            "batch_size": (self.batch_size >= 2, "at least 2 (batch normalisation needs them)"),
            "learning_rate": (0 < self.learning_rate < math.inf, "more than 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "from 0 to below 1"),
            "clip_norm": (0 < self.clip_norm < math.inf, "more than 0"),
            "ema_decay": (0 <= self.ema_decay < 1, "from 0 to below 1"),
            "seed": (0 <= self.seed < 2**32, "from 0 to below 2**32"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UsageError(f"{name} {getattr(self, name)}", expected, "give another value")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for a record of the run."""
        return asdict(self)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one pass, so that a resumed run draws what it would have drawn."""
    return seed + 1_000_003 * epoch
