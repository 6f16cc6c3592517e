"""``config.json``: everything that is needed to serve a checkpoint, checked field by field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mambamic._version import __version__
from mambamic.errors import CheckpointError, UsageError
from mambamic.preprocess import INTERPOLATIONS, RESIZE_RULES, Preprocess, Triple

FORMAT_VERSION = 1
ARCHITECTURES = (
    "mambamic_t",
    "mambamic_s",
    "mambamic_b",
    "medmamba_t",
    "medmamba_s",
    "medmamba_b",
)
HEADS = ("softmax", "sigmoid")
# What still has one position in the last stage; here too, so that it is told before any work.
_SMALLEST, _LARGEST = 29, 4096
_SMALLEST_MEDMAMBA = 32


@dataclass(frozen=True)
class Config:
    """What a checkpoint states about itself.

    Args:
        architecture: One of ``ARCHITECTURES``.
        classes: Names, in the order of the logits.
        input_size: Side of the model's input in pixels.
        resize: ``stretch`` or ``shorter_side``, see ``Preprocess``.
        interpolation: ``bilinear`` or ``bicubic``.
        mean: Per channel, of values from 0 to 1.
        std: Per channel, of values from 0 to 1.
        mpp: Microns per pixel of the tiles, None where unknown.
        head: ``softmax`` (one class is right) or ``sigmoid`` (each on its own).
        temperature: What the logits are divided by, None for 1.
        licence: Of the weights, an SPDX identifier where there is one.
        training_data: What it was trained on.
        metrics: Whatever was measured, as JSON.
        weights_sha256: Of ``model.safetensors``, 64 hexadecimal digits.
        mambamic_version: The version that wrote it.
        format_version: Of this file.

    Raises:
        CheckpointError: A field has a value that makes no sense; the error names it.
    """

    architecture: str
    classes: tuple[str, ...]
    input_size: int = 224
    resize: str = "stretch"
    interpolation: str = "bilinear"
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    mpp: float | None = None
    head: str = "softmax"
    temperature: float | None = None
    licence: str = "unknown"
    training_data: str = "unknown"
    metrics: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = "0" * 64
    mambamic_version: str = __version__
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check every field."""
        for name, (holds, expected) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise _wrong(name, value, expected)
        if self.architecture.startswith("medmamba") and self.input_size < _SMALLEST_MEDMAMBA:
            expected = f"at least {_SMALLEST_MEDMAMBA} for {self.architecture}"
            raise _wrong("input_size", self.input_size, expected)

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's input."""
        return Preprocess(self.input_size, self.resize, self.interpolation, self.mean, self.std)

    def to_json(self) -> str:
        """Return the text of ``config.json``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_settings(cls, **fields: Any) -> Config:
        """Build a config from what a user chose, where a wrong value is a wrong call.

        Raises:
            UsageError: Naming the field, its value, and what was expected.
        """
        try:
            return cls(**fields)
        except CheckpointError as error:
            raise UsageError(error.problem, error.expected, error.remedy) from error

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Read the text of ``config.json``: every field there, none unknown, each value right.

        Raises:
            CheckpointError: Naming the field, its value, and what was expected.
        """
        try:
            stated = json.loads(text)
        except ValueError as error:
            raise CheckpointError(
                f"config.json is not JSON ({error})", "a JSON object", "get the checkpoint again"
            ) from error
        if not isinstance(stated, Mapping):
            raise CheckpointError(
                f"config.json holds a {type(stated).__name__}", "a JSON object", _AGAIN
            )
        # Before anything else: another format may well have other fields.
        if "format_version" in stated:
            _check_format(stated["format_version"])
        known = {entry.name for entry in fields(cls)}
        for name in sorted(known - stated.keys()):
            raise CheckpointError(
                f"config.json has no field {name!r}", _RULES[name][1], "add it, or " + _AGAIN
            )
        for name in sorted(stated.keys() - known):
            raise CheckpointError(
                f"config.json has the unknown field {name!r} ({stated[name]!r})",
                "only " + ", ".join(entry.name for entry in fields(cls)),
                "remove it, or correct its name",
            )
        return cls(**{name: _frozen(value) for name, value in stated.items()})


_AGAIN = "get the checkpoint again"
_Rule = tuple[Callable[[Any], bool], str]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    # JSON holds whole numbers of any length; beyond these no float can follow.
    whole = type(value) is int and abs(value) < 2**53
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))


def _is_mean(value: Any) -> bool:
    return _is_triple(value) and min(value) >= 0 and max(value) <= 1


def _is_positive_triple(value: Any) -> bool:
    return _is_triple(value) and min(value) > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_classes(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(map(_is_text, value))
        and len(set(value)) == len(value)
    )


def _is_json_object(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _one_of(*known: str) -> _Rule:
    # `in` on a tuple, not a set: a JSON list or object has no hash.
    return lambda value: value in known, "one of " + ", ".join(known)


_POSITIVE_OR_NULL: _Rule = (
    lambda value: value is None or _is_positive(value),
    "a number above 0, or null",
)
_RULES: dict[str, _Rule] = {
    "architecture": _one_of(*ARCHITECTURES),
    "classes": (_are_classes, "a list of at least one distinct, non-empty name"),
    "input_size": (
        lambda value: type(value) is int and _SMALLEST <= value <= _LARGEST,
        f"a whole number from {_SMALLEST} to {_LARGEST}",
    ),
    "resize": _one_of(*RESIZE_RULES),
    "interpolation": _one_of(*INTERPOLATIONS),
    "mean": (_is_mean, "three numbers from 0 to 1"),
    "std": (_is_positive_triple, "three numbers above 0"),
    "mpp": _POSITIVE_OR_NULL,
    "head": _one_of(*HEADS),
    "temperature": _POSITIVE_OR_NULL,
    "licence": (_is_text, "the licence of the weights, such as Apache-2.0"),
    "training_data": (_is_text, "what the model was trained on"),
    "metrics": (_is_json_object, "a JSON object with finite numbers"),
    "weights_sha256": (
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
        "64 lower-case hexadecimal digits",
    ),
    "mambamic_version": (_is_text, "the version that wrote the checkpoint"),
    "format_version": (
        lambda value: type(value) is int and value == FORMAT_VERSION,
        str(FORMAT_VERSION),
    ),
}


def _wrong(name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"config field {name!r} is {value!r}", expected, "correct it")


def _check_format(version: object) -> None:
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has format_version {version!r}",
            f"{FORMAT_VERSION}, which mambamic {__version__} reads",
            "install the mambamic that wrote it, or a newer one",
        )
