"""What becomes of a batch when a real GPU's memory runs out."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from loadtest.images import cells, zipped
from mambamic.export.archive import write_archive

from .handler_workers import Worker, as_sent

pytestmark = pytest.mark.gpu
TILES = 64  # a part, and twice the largest batch that is warmed up


def test_a_batch_that_does_not_fit_is_halved(root: Path, tmp_path: Path) -> None:
    archive = write_archive(
        root / "model_store" / "mambamic_t_pbc", tmp_path / "cells.mar", model_name="cells",
        version="1.0",
    )  # fmt: skip
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "cells")
    worker = Worker(tmp_path / "cells", gpu=0)
    request = as_sent([("tiles", "application/zip", zipped(cells(TILES)))])
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    # What the model and the batches that are warmed up hold, and next to nothing more.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 2**22) / total)
    handed: list[int] = []
    outputs = worker.handler._classifier.outputs

    def counted(pixels: object) -> object:
        assert hasattr(pixels, "__len__")
        handed.append(len(pixels))
        return outputs(pixels)  # type: ignore[arg-type]

    try:
        worker.handler._classifier.outputs = counted  # type: ignore[method-assign, assignment]
        status, answer = worker.answer(request)[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        worker.handler._classifier.outputs = outputs  # type: ignore[method-assign]
    assert handed == [TILES, TILES // 2, TILES // 2], "it did not run out, or was not halved"
    assert status == 200, json.dumps(answer)[:500]
    assert len(answer) == TILES
    assert all("label" in entry for entry in answer)
    # And with memory again, as before.
    assert [entry["label"] for entry in worker.answer(request)[0][1]] == [
        entry["label"] for entry in answer
    ]
    worker.handler.close()
