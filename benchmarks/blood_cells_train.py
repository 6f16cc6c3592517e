"""Train the runs of docs/results.md, one on each device at a time: teachers, then their learners.

A run begins when its teachers are finished and a device is free. Each leaves RUNS/NAME and
RUNS/NAME.log; the same call goes on with what is not finished. Options that are not known here go
to every ``mambamic train``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mambamic.machine import usable_cpus
from mambamic.training.run import RESULT

_DEMO = Path(__file__).parent.parent / "model_store/mambamic_t_pbc"


@dataclass(frozen=True)
class Task:
    """One run."""

    architecture: str
    seed: int
    teachers: tuple[str, ...] = ()
    name: str = field(init=False)

    def __post_init__(self) -> None:
        """Name it."""
        object.__setattr__(self, "name", f"{self.architecture}_seed{self.seed}")


_TEACHERS = (Task("mambamic_t", 10), Task("medmamba_t", 0))
_TAUGHT = tuple(Task("mambamic_t", seed, tuple(t.name for t in _TEACHERS)) for seed in range(3))
TASKS = (*_TEACHERS, *_TAUGHT, Task("mambamic_s", 0), Task("mambamic_b", 0))


class Queue:
    """The runs, and what became of them.

    Args:
        data: The images.
        runs: A folder for each run.
        others: Checkpoints that teach beside the runs.
        devices: How many share the work; 0 for the CPU alone.
        more: Options for each run.
        archives: Where the checkpoint and the logs of a finished run go as NAME.tar, if anywhere.
    """

    def __init__(
        self, data: Path, runs: Path, others: list[Path], devices: int, more: list[str],
        archives: Path | None,
    ) -> None:  # fmt: skip
        self._data, self._runs, self._others, self._more = data, runs, others, more
        self._devices, self._archives = devices, archives
        self._waiting = list(TASKS)
        self._ended: dict[str, bool] = {}
        self._changed = threading.Condition()

    def run(self) -> bool:
        """Do all that can be done; return whether that was everything."""
        self._runs.mkdir(parents=True, exist_ok=True)
        threads = [
            threading.Thread(target=self._work, args=(device,))
            for device in range(max(1, self._devices))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(self._ended) == len(TASKS) and all(self._ended.values())

    def _work(self, device: int) -> None:
        os.sched_setaffinity(0, self._cores(device))  # of this thread and what it starts
        while (task := self._next()) is not None:
            well = self._train(task, device)
            with self._changed:
                self._ended[task.name] = well
                self._changed.notify_all()

    def _next(self) -> Task | None:
        """Return the first run that can begin, as soon as there is one; None where none will."""
        with self._changed:
            while self._waiting:
                lost = {name for name, well in self._ended.items() if not well}
                self._waiting = [t for t in self._waiting if not lost & set(t.teachers)]
                for task in self._waiting:
                    if all(name in self._ended for name in task.teachers):
                        self._waiting.remove(task)
                        return task
                self._changed.wait(1)
            return None

    def _train(self, task: Task, device: int) -> bool:
        out = self._runs / task.name
        call = [sys.executable, "-m", "mambamic", "train", str(self._data), "--out", str(out)]
        call += ["--arch", task.architecture, "--seed", str(task.seed), *self._more]
        if task.teachers:
            checkpoints = [self._runs / name / RESULT for name in task.teachers]
            call += ["--teachers", *map(str, [*checkpoints, *self._others])]
        begun = time.monotonic()
        with out.with_suffix(".log").open("a") as log:
            ended = subprocess.run(
                call, stdout=log, stderr=log, env=self._environment(device)
            ).returncode
        print(f"{task.name}: status {ended} after {time.monotonic() - begun:.0f} s", flush=True)
        if ended == 0 and self._archives is not None:
            _archive(out, self._archives)
        return ended == 0

    def _environment(self, device: int) -> dict[str, str]:
        seen = {"CUDA_VISIBLE_DEVICES": str(device)} if self._devices else {}
        return {**os.environ, "PYTHONUNBUFFERED": "1", **seen}

    def _cores(self, device: int) -> set[int]:
        """Return a part of the processor for each device: reading images would take all."""
        cores = sorted(os.sched_getaffinity(0))
        each = max(1, usable_cpus() // max(1, self._devices))
        return set(cores[device * each : (device + 1) * each]) or set(cores)


def _archive(run: Path, folder: Path) -> None:
    """Put a finished run's checkpoint and logs into one file, without the states to resume from."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{run.name}.tar"
    with tarfile.open(fresh, "w") as archive:
        for part in (RESULT, "log", "run.json"):
            archive.add(run / part, f"{run.name}/{part}")
    fresh.replace(folder / f"{run.name}.tar")


def main() -> int:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.zip and val.zip")
    parser.add_argument("runs", type=Path)
    parser.add_argument(
        "--teachers", type=Path, nargs="*", default=[_DEMO], help="beside the runs that teach"
    )
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count())
    parser.add_argument("--archives", type=Path, help="for a NAME.tar of each finished run")
    args, more = parser.parse_known_args()
    given = (args.data, args.runs, args.teachers, args.devices, more, args.archives)
    return 0 if Queue(*given).run() else 1


if __name__ == "__main__":
    sys.exit(main())
