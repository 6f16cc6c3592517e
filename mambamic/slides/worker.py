"""One process per device: each a run of its own on the same folder, sharing it by claims.

The child is ``python -m mambamic.slides.worker SOCKET``. It is told what to do, says how it
gets on, and leaves when the other side of its socket is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from mambamic.errors import DataError, MambamicError, ServerError
from mambamic.slides.inspection import Inspection, Refusal
from mambamic.slides.models import ModelChoice
from mambamic.slides.pipeline import run_parts
from mambamic.slides.pool import ReaderPool
from mambamic.slides.run import Run, Share, Task
from mambamic.slides.scorers import Scorer
from mambamic.slides.settings import ModelFacts


def device_names(device: str, count: int) -> list[str]:
    """Return a device per process: GPUs from the named one on, or the CPU several times.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        count: How many processes.

    Raises:
        UsageError: Not such a name.
        BackendError: There are not so many GPUs here.
    """
    # Without torch, which has a say only in GPUs, it is ONNX Runtime on the CPU.
    if device == "cpu" or (device == "auto" and find_spec("torch") is None):
        return ["cpu"] * count
    from mambamic.engine import find_device

    first = find_device(device)
    if first.type == "cpu":
        return ["cpu"] * count
    names = [f"cuda:{n}" for n in range(first.index, first.index + count)]
    find_device(names[-1])
    return names


def score_here(run: Run, scorer: Scorer, readers: int) -> None:
    """Score in this process what is missing.

    Args:
        run: What is to be done.
        scorer: The model; it is closed.
        readers: Processes that read tiles.
    """
    try:
        size = scorer.facts.preprocess.input_size
        with ReaderPool(readers, scorer.batch, size, scorer.threads) as pool:
            run.score(
                lambda parts: run_parts(parts, pool, scorer, run.seconds),
                scorer.describe(),
                encoded=scorer.encoded,
            )
    finally:
        scorer.close()


def score_on_devices(run: Run, choices: Sequence[ModelChoice], readers: int) -> None:
    """Score in a process per device what is missing, and wait for all of them.

    A process that fails is noted; what it had claimed is done by the others.

    Args:
        run: What is to be done.
        choices: The model, for each process on its device.
        readers: Processes that read tiles, all together.

    Raises:
        MambamicError: A process failed, and the others have not done its work.
    """
    each = max(1, readers // len(choices))
    children = [_Child(run, choice, each) for choice in choices]
    try:
        for child in children:
            child.thread.join()
    finally:
        for child in children:
            child.stop()
    failures = [child.failure for child in children if child.failure is not None]
    run.notes += [
        f"device {child.thread.name} gave up: {child.failure}"
        for child in children
        if child.failure is not None
    ]
    if failures and not run.is_complete():
        raise failures[0]


class _Child:
    def __init__(self, run: Run, choice: ModelChoice, readers: int) -> None:
        self._run = run
        self.failure: MambamicError | None = None
        self._connection, theirs = Pipe()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mambamic.slides.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        with contextlib.suppress(OSError):
            task = replace(run.task, progress=None)
            self._connection.send((task, run.slides, run.model, choice, readers))
        self.thread = threading.Thread(target=self._listen, name=choice.device)
        self.thread.start()

    def _listen(self) -> None:
        try:
            while isinstance(said := self._connection.recv(), tuple):
                self._run.count(*said)
        except (EOFError, OSError):
            code = self._process.wait()
            said = ServerError(
                f"the process of a device ended with the exit status {code}",
                "one that scores until all is done",
                "read what it wrote above, and run again: what is done is kept",
            )
        if isinstance(said, Share):
            self._run.take_over(said)
        else:
            self.failure = said

    def stop(self) -> None:
        self._connection.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(connection: Connection) -> None:
    """Do a run's work on one device, and report to the process that asked for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task: Task
    slides: list[Inspection | Refusal]
    model: ModelFacts
    task, slides, model, choice, readers = connection.recv()

    def progress(done: int, planned: int) -> None:
        connection.send((done, planned))

    run = Run(replace(task, progress=progress), slides, model)
    # A parent that is gone closes the socket: the next report fails, and ends this process.
    with contextlib.suppress(OSError):
        try:
            score_here(run, choice.load(), readers)
        except MambamicError as error:
            connection.send(error)
        except ConnectionError:
            return
        except OSError as error:
            connection.send(
                DataError(
                    f"{error.filename or task.out} ({error.strerror})",
                    "an output folder that can be written to, with room",
                    "see to it and run again: what is done is kept",
                )
            )
        else:
            connection.send(run.share())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
