"""What an archive's configuration tells the handler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ts.context import Context
from ts.service import Service

from mambamic.errors import CheckpointError, UsageError
from mambamic.handlers.service import ImageClassifier

from .handler_workers import as_sent, model_dir, png
from .random_checkpoint import CLASSES

__all__ = ["model_dir"]  # a fixture


@pytest.mark.parametrize("version", ["0.0.9", "0.99.0", "1.0.0"])
def test_an_archive_of_another_version_is_refused(
    model_dir: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambamic.handlers.service.__version__", "0.1.7")
    with pytest.raises(CheckpointError, match=version):
        _initialize(model_dir, {"version": version})


@pytest.mark.parametrize("section", [None, {}, "0.1.0"])
def test_an_archive_without_a_version_is_refused(model_dir: Path, section: object) -> None:
    with pytest.raises(CheckpointError, match="mambamic archive"):
        _initialize(model_dir, section)


@pytest.mark.parametrize("decoders", [-1, "4", 1.5, True])
def test_decoders_must_be_a_number(model_dir: Path, decoders: object) -> None:
    with pytest.raises(UsageError, match="decoders"):
        _initialize(model_dir, {"version": "0.1.0", "decoders": decoders})


def test_tiles_are_decoded_in_processes_where_asked_for(model_dir: Path) -> None:
    config = {"version": _written_version(model_dir), "decoders": 1}
    context = Context(
        "cells",
        str(model_dir),
        {"model": {}},
        32,
        None,
        "0",
        model_yaml_config={"mambamic": config},
    )
    handler = ImageClassifier()
    handler.initialize(context)
    try:
        processors, inputs, _ = Service.retrieve_data_for_inference(
            [as_sent([("image", "image/png", png(1))]), as_sent([("image", "", b"junk")])]
        )
        context.request_processor = processors
        good, bad = (json.loads(body) for body in handler.handle(inputs, context))
        assert good["label"] in CLASSES
        assert bad["error"]["code"] == "decode_failed"
    finally:
        handler.close()


def _written_version(model_dir: Path) -> str:
    config = yaml.safe_load((model_dir / "model-config.yaml").read_text())
    return str(config["mambamic"]["version"])


def _initialize(model_dir: Path, section: object) -> None:
    config = {"mambamic": section}
    context = Context(
        "cells", str(model_dir), {"model": {}}, 1, None, "0", model_yaml_config=config
    )
    ImageClassifier().initialize(context)
