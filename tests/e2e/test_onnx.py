"""An archive with an ONNX file beside one with weights: the same answers over HTTP."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mambamic.cli import main
from mambamic.export.onnx_verify import random_pixels
from mambamic.preprocess import Pixels

from .servers import serve


def test_both_archives_answer_alike(
    checkpoint: Path, cell: bytes, state: Path, tmp_path: Path
) -> None:
    archives = {form: tmp_path / f"{form}.mar" for form in ("torch", "onnx")}
    for form, path in archives.items():
        command = ["archive", str(checkpoint), "--name", form, "--format", form]
        assert main([*command, "--out", str(path)]) == 0
    images = [cell, *map(png, random_pixels(2, 224))]
    more = ("--model", str(archives["onnx"]), "--device", "cpu")
    with serve(state, str(archives["torch"]), *more) as server:
        ours, theirs = replace(server, model="onnx"), replace(server, model="torch")
        described = [one.describe()["customizedMetadata"] for one in (ours, theirs)]
        assert ["onnxruntime" in str(text) for text in described] == [True, False]
        fields = [(f"image{i}", image, "image/png") for i, image in enumerate(images)]
        answers = [one.form(*fields) for one in (ours, theirs)]
        assert [answer.status for answer in answers] == [200, 200]
        for found, expected in zip(*(answer.json for answer in answers), strict=True):
            assert found["label"] == expected["label"]
            assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-3)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
