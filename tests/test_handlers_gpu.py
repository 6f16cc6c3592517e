"""What a worker does where the GPU fails it; that fails here on demand, and there need be none."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambamic import Classifier
from mambamic.handlers import gpu
from mambamic.handlers.metrics import _Gpu

from .handler_workers import Worker, as_sent, before_the_network, model_dir, png, worker
from .test_handlers_metrics import Recorded

__all__ = ["model_dir", "worker"]


def fail(*ignored: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How often the worker has decided to leave, which it does not do."""
    times: list[bool] = []
    monkeypatch.setattr(gpu, "leave", lambda: times.append(True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return times


IMAGE = as_sent([("image", "image/png", png(1))])


def test_a_worker_with_a_broken_gpu_answers_each_image_and_leaves(
    worker: Worker, left: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with before_the_network(worker, fail):
        junk = as_sent([("image", "", b"junk")])
        assert [status for status, _ in worker.answer(IMAGE, IMAGE, junk)] == [500, 500, 400]
        # An error of the model alone is no reason to leave.
        assert left == []
        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        assert [status for status, _ in worker.answer(junk)] == [400]
        assert left == []
        assert [status for status, _ in worker.answer(IMAGE, junk)] == [500, 400]
        assert left == [True]


def test_where_there_is_no_gpu_none_is_broken() -> None:
    gpu.release_memory()
    assert torch.cuda.is_initialized() or not gpu.is_broken()


def test_who_leaves_says_so_and_ends_as_if_it_were_killed() -> None:
    code = "from mambamic.handlers import gpu; import time; gpu.leave(); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert "another one" in done.stderr


def test_gauges_of_a_gpu_that_does_not_answer(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = Classifier.load(random_checkpoint, device="cpu")
    recorded = Recorded(classifier)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    with caplog.at_level(logging.ERROR):
        _Gpu(recorded.recorder, classifier).sample()
    recorded.recorder.close()
    assert "does not tell" in caplog.text
