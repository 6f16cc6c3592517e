"""What a training run is told, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mambamic.errors import UsageError

Pair = tuple[float, float]
_REDUCTION = 32  # pixels of the input that the networks' last stage has one place for


def _as(about: str, expected: str, holds: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the metadata of a setting: what it is, and which values it takes."""
    return {"about": about, "expected": expected, "holds": holds}


def _least(about: str, low: float) -> dict[str, Any]:
    return _as(about, f"at least {low:g}", lambda value: low <= value < math.inf)


def _within(about: str, high: float = 1) -> dict[str, Any]:
    return _as(about, f"from 0 to {high:g}", lambda value: 0 <= value <= high)


def _fraction(about: str) -> dict[str, Any]:
    return _as(about, "from 0 to below 1", lambda value: 0 <= value < 1)


def _choice(about: str, *known: str) -> dict[str, Any]:
    return _as(f"{about}: {' or '.join(known)}", f"one of {', '.join(known)}", known.__contains__)


def _span(about: str, high: float) -> dict[str, Any]:
    expected = f"two numbers above 0 and at most {high:g}, the lower first"
    return _as(about, expected, lambda pair: 0 < pair[0] <= pair[1] <= high)


def _check(settings: Any) -> None:
    for each in fields(settings):
        value, holds = getattr(settings, each.name), each.metadata.get("holds")
        if holds is not None and not holds(value):
            raise UsageError(
                f"{each.name} {value}", each.metadata["expected"], "give another value"
            )


@dataclass(frozen=True)
class Strengths:
    """How much augmentation changes images; each field's metadata says what it is."""

    crop_area: Pair = field(
        default=(1.0, 1.0), metadata=_span("share of the image that is cut out and enlarged", 1)
    )
    crop_ratio: Pair = field(
        default=(0.75, 4 / 3), metadata=_span("width to height of what is cut out", 10)
    )
    horizontal_flip: float = field(
        default=0.5, metadata=_within("probability of a flip left to right")
    )
    vertical_flip: float = field(default=0.5, metadata=_within("probability of a flip upside down"))
    quarter_turns: float = field(
        default=1.0, metadata=_within("probability of 0 to 3 quarter turns, which blur nothing")
    )
    affine: float = field(
        default=0.5, metadata=_within("probability of what rotation, scale and shift do")
    )
    rotation: float = field(default=180.0, metadata=_within("degrees to either side", 180))
    scale: Pair = field(
        default=(0.8, 1.2), metadata=_span("factors between which the size changes", 10)
    )
    shift: float = field(default=0.06, metadata=_within("share of the side, in either direction"))
    stain: float = field(
        default=0.05, metadata=_fraction("change of each stain's amount, 0 for none")
    )
    colour: float = field(default=0.8, metadata=_within("probability of what the next four do"))
    brightness: float = field(
        default=0.2, metadata=_within("added to or taken from all channels, at most")
    )
    contrast: float = field(
        default=0.2, metadata=_within("change of the factor of all channels, at most")
    )
    saturation: float = field(default=0.2, metadata=_within("change of the saturation, at most"))
    hue: float = field(
        default=0.03, metadata=_within("turn of the hue, as a share of the circle, at most", 0.5)
    )
    mixup: float = field(
        default=0.3,
        metadata=_within("largest share of another image that is blended in, with its label", 0.5),
    )

    def __post_init__(self) -> None:
        """Refuse strengths that make no sense."""
        _check(self)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; the defaults are those of ``recipes/microscopy.toml``.

    Each field's metadata says what it is.
    """

    epochs: int = field(default=64, metadata=_least("passes over the training images", 1))
    warmup_epochs: int = field(
        default=3, metadata=_least("of these, with a rising learning rate", 0)
    )
    early_share: float = field(
        default=0.6,
        metadata=_within("share of the epochs, the first, on smaller images: they take less time"),
    )
    early_side: float = field(
        default=5 / 7,
        metadata=_as(
            "side of these, as a share of the input size",
            "more than 0 and at most 1",
            lambda value: 0 < value <= 1,
        ),
    )
    batch_size: int = field(
        default=128,
        metadata=_as(
            "images per step, over all devices",
            "at least 2 (batch normalisation needs them)",
            lambda value: value >= 2,
        ),
    )
    optimiser: str = field(default="adamw", metadata=_choice("of the weights", "adamw", "adam"))
    learning_rate: float = field(
        default=1.2e-3,
        metadata=_as(
            "at the end of the warm-up", "more than 0", lambda value: 0 < value < math.inf
        ),
    )
    schedule: str = field(
        default="cosine",
        metadata=_choice("of the learning rate after the warm-up", "cosine", "constant"),
    )
    warmup_start: float = field(
        default=1e-3, metadata=_within("share of the learning rate at the first step")
    )
    final_rate: float = field(
        default=0.0, metadata=_within("share of the learning rate at the end of the cosine")
    )
    weight_decay: float = field(
        default=0.05,
        metadata=_least(
            "on matrices and kernels; norms, biases and state-space parameters have none", 0
        ),
    )
    label_smoothing: float = field(
        default=0.05, metadata=_fraction("probability spread over all classes")
    )
    clip_norm: float = field(
        default=1.0, metadata=_least("largest norm of the gradient, 0 for any", 0)
    )
    ema_decay: float = field(
        default=0.998,
        metadata=_fraction("per step in the long run, of the average of the weights; 0: none"),
    )
    class_weighting: str = field(
        default="none",
        metadata=_choice("of rare classes in the loss", "none", "balanced", "effective"),
    )
    distillation: float = field(
        default=0.7,
        metadata=_within("share of the loss that is of --teachers, where there are any"),
    )
    patience: int = field(
        default=0,
        metadata=_least(
            "epochs without a lower validation loss after which to stop, 0 for never", 0
        ),
    )
    seed: int = field(
        default=0,
        metadata=_as(
            "of the initial weights, the order of the images and the augmentation",
            "from 0 to below 2**32",
            lambda value: 0 <= value < 2**32,
        ),
    )
    augmentation: Strengths = field(default_factory=Strengths)

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        _check(self)
        if self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"warmup_epochs {self.warmup_epochs}",
                f"fewer than the {self.epochs} epochs",
                "give fewer (--warmup-epochs 0, say), or more epochs",
            )

    def side(self, epoch: int, full: int) -> int:
        """Return the side of the images of an epoch: a multiple of 32, or the input size.

        Args:
            epoch: Counted from 0.
            full: The input size.
        """
        if epoch >= round(self.early_share * self.epochs):
            return full
        return min(full, max(1, round(self.early_side * full / _REDUCTION)) * _REDUCTION)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for a record of the run, those of the augmentation within."""
        return asdict(self)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one pass, so that a resumed run draws what it would have drawn."""
    return seed + 1_000_003 * epoch
