"""``config.json`` says everything, and everything in it is checked."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from mambamic._version import __version__
from mambamic.config import ARCHITECTURES, Config
from mambamic.errors import CheckpointError
from mambamic.models import VARIANTS
from mambamic.preprocess import Preprocess

CONFIG = Config(
    architecture="medmamba_s",
    classes=("a", "b c", "ü"),
    input_size=96,
    resize="shorter_side",
    interpolation="bicubic",
    mean=(0.1, 0.2, 0.3),
    std=(1, 2, 3),
    mpp=0.25,
    head="sigmoid",
    temperature=1.5,
    licence="Apache-2.0",
    training_data="cells",
    metrics={"accuracy": 0.98},
    weights_sha256="ab" * 32,
)


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(CONFIG.to_json()), **fields})


def test_there_and_back() -> None:
    assert Config.from_json(CONFIG.to_json()) == CONFIG
    assert json.loads(CONFIG.to_json())["mambamic_version"] == __version__


def test_architectures_are_the_models() -> None:
    assert set(ARCHITECTURES) == set(VARIANTS)


def test_preprocess() -> None:
    expected = Preprocess(96, "shorter_side", "bicubic", (0.1, 0.2, 0.3), (1, 2, 3))
    assert CONFIG.preprocess == expected


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_missing_field(field: str) -> None:
    stated = json.loads(CONFIG.to_json())
    del stated[field]
    with pytest.raises(CheckpointError, match=f"no field '{field}'; expected ."):
        Config.from_json(json.dumps(stated))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "resnet"),
        ("architecture", ["mambamic_t"]),
        ("classes", []),
        ("classes", "abc"),
        ("classes", ["a", "a"]),
        ("classes", ["a", " "]),
        ("classes", ["a", 1]),
        ("input_size", 8),
        ("input_size", 224.0),
        ("input_size", True),
        ("input_size", "224"),
        ("resize", "pad"),
        ("interpolation", None),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, "x"]),
        ("mean", 0.5),
        ("mean", [123.7, 116.3, 103.5]),
        ("mean", [-0.1, 0.5, 0.5]),
        ("std", [0.5, 0.5, 0]),
        ("std", [0.5, 0.5, -1]),
        ("std", [0.5, 0.5, float("nan")]),
        ("mpp", 0),
        ("mpp", "0.5"),
        ("mpp", float("inf")),
        ("head", "linear"),
        ("temperature", 0),
        ("temperature", -1.0),
        ("licence", ""),
        ("training_data", None),
        ("metrics", []),
        ("metrics", {"accuracy": float("nan")}),
        ("weights_sha256", "ab"),
        ("weights_sha256", "AB" * 32),
        ("mambamic_version", ""),
    ],
)
def test_wrong_field(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"config field '{field}' is .*expected .*correct"):
        Config.from_json(changed(**{field: value}))


def test_null_is_a_value_where_unknown_is() -> None:
    config = Config.from_json(changed(mpp=None, temperature=None))
    assert (config.mpp, config.temperature) == (None, None)


def test_unknown_field() -> None:
    with pytest.raises(CheckpointError, match="unknown field 'temprature' \\(2\\)"):
        Config.from_json(changed(temprature=2))


def test_other_format() -> None:
    # Reported as such, and not by what else is new in it.
    with pytest.raises(CheckpointError, match="format_version 2; expected 1"):
        Config.from_json(changed(format_version=2, tiling="overlap"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"'])
def test_not_an_object(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Config.from_json(text)
