from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from mambamic.errors import BackendError, UsageError
from mambamic.slides.finish import Finish
from mambamic.slides.inputs import SlideInput
from mambamic.slides.inspection import inspect
from mambamic.slides.models import ModelChoice
from mambamic.slides.run import Run, Task
from mambamic.slides.settings import Settings
from mambamic.slides.worker import device_names, score_on_devices

from .slide_files import blobs, write_slide


def test_the_cpu_several_times_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mambamic.engine", None)
    assert device_names("cpu", 3) == ["cpu"] * 3


def test_devices_are_those_from_the_named_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert device_names("auto", 3) == device_names("cuda", 3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert device_names("cuda:1", 2) == ["cuda:1", "cuda:2"]
    for device, count in (("cuda", 4), ("cuda:1", 3), ("cuda:3", 1)):
        with pytest.raises(BackendError, match="one of the 3 GPUs"):
            device_names(device, count)
    with pytest.raises(UsageError, match="cuda:one"):
        device_names("cuda:one", 2)


def test_a_device_that_fails_is_said_where_others_do_its_work(
    tmp_path: Path, random_checkpoint: Path
) -> None:
    settings = Settings(tile=64, stride=64, target_mpp=None, tissue="none")
    slide = write_slide(tmp_path / "s.tiff", (512, 512), 1, blobs([(250, 250, 100)]))
    good = ModelChoice(random_checkpoint, "cpu")
    seen = inspect(SlideInput(slide, slide.name), good.facts(), settings)
    finish = Finish(0.05, csv=False, geojson=False, run={"command": "test", "versions": ""})
    run = Run(Task(tmp_path / "out", settings, finish, "test"), [seen], good.facts())
    (tmp_path / "out").mkdir()
    score_on_devices(run, [good, ModelChoice(random_checkpoint, "cuda:99")], readers=1)
    (entry,) = run.write_record()
    assert (entry["status"], run.tiles) == ("ok", 64)
    (note,) = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert note.startswith("device cuda:99 gave up: ")
    assert "is not here" in note
