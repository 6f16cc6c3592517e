"""What a model says about one image; free of torch, so that a client can hold it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Args:
        label: The most probable class.
        probability: Of that class.
        probabilities: Of every class, in the checkpoint's order.
        embedding: What the network's head saw, (C,), where it was asked for.
        ood_score: How far from the images that the model knows, where the checkpoint has a
            detector; images of their kind are mostly below 1.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    embedding: tuple[float, ...] | None = None
    ood_score: float | None = None

    @property
    def in_distribution(self) -> bool | None:
        """Whether the image is of the kind that the model knows, None where nobody can tell."""
        return None if self.ood_score is None else self.ood_score <= 1

    def as_json(self) -> dict[str, Any]:
        """Return it as an object that JSON can hold, with six significant digits."""
        fields: dict[str, Any] = {
            "label": self.label,
            "probability": _six_digits(self.probability),
            "probabilities": {name: _six_digits(p) for name, p in self.probabilities.items()},
        }
        if self.ood_score is not None:
            fields["in_distribution"] = self.in_distribution
            fields["ood_score"] = _six_digits(self.ood_score)
        if self.embedding is not None:
            fields["embedding"] = [_six_digits(value) for value in self.embedding]
        return fields


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")
