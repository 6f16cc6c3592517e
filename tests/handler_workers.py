"""The handler as TorchServe's worker runs it, and requests as it gets them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ts.context import Context
from ts.service import Service

from mambamic.engine import TorchEngine
from mambamic.export.archive import write_archive
from mambamic.handlers.gate import VARIABLE
from mambamic.handlers.service import ImageClassifier

Fields = list[tuple[str, str, bytes]]


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def as_sent(fields: Fields, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What TorchServe's worker reads from its socket for one request."""
    return {
        "requestId": b"id",
        "headers": [
            {"name": name.encode(), "value": value.encode()}
            for name, value in (headers or {}).items()
        ],
        "parameters": [
            {"name": name, "contentType": content_type, "value": bytearray(value)}
            for name, content_type, value in fields
        ],
    }


class Worker:
    """The handler with TorchServe's own context and request parsing around it."""

    def __init__(self, model_dir: Path, gpu: int | None = None, **settings: object) -> None:
        manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())
        config = yaml.safe_load((model_dir / "model-config.yaml").read_text()) | settings
        self.context = Context(
            "cells", str(model_dir), manifest, 32, gpu, "0.12.0", model_yaml_config=config
        )
        self.handler = ImageClassifier()
        self.handler.initialize(self.context)

    def answer(self, *requests: dict[str, Any]) -> list[tuple[int, Any]]:
        processors, inputs, _ = Service.retrieve_data_for_inference(list(requests))
        self.context.request_processor = processors
        bodies = self.handler.handle(inputs, self.context)
        assert len(bodies) == len(requests)
        for index in range(len(requests)):
            assert self.context.get_response_content_type(index) == "application/json"
        return [
            (self.context.get_response_status(index)[0], json.loads(body))
            for index, body in enumerate(bodies)
        ]

    def answer_one(self, fields: Fields) -> tuple[int, Any]:
        return self.answer(as_sent(fields))[0]


@pytest.fixture(scope="module")
def model_dir(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    archive = write_archive(
        random_checkpoint, folder.parent / "cells.mar", model_name="cells", version="2.1"
    )
    with zipfile.ZipFile(archive) as packed_model:
        packed_model.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        made = Worker(model_dir)
    yield made
    made.handler.close()


@contextmanager
def before_the_network(worker: Worker, work: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call something with each batch of pixels that goes into the network."""
    engine = worker.handler._classifier._engine
    assert isinstance(engine, TorchEngine)
    network = engine.network

    def both(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        work(pixels)
        return network(pixels)

    engine.network = both
    try:
        yield
    finally:
        engine.network = network
