"""Train the runs of docs/results.md: teachers, then their learners, and other sizes.

As many at a time as there are devices; where fewer are left, each has several. Every run leaves
RUNS/NAME and RUNS/NAME.log; the same call goes on with what is not finished. Options that are not
known here go to every ``mambamic train``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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


_TEACHER = Task("medmamba_t", 0)
_TAUGHT = tuple(Task("mambamic_t", seed, (_TEACHER.name,)) for seed in range(3))
# Those of one round do not need one another. Seed 10 shows what comes of it without teachers.
ROUNDS = (
    (_TEACHER, Task("mambamic_s", 0)),
    _TAUGHT,
    (Task("mambamic_t", 10), Task("mambamic_b", 0)),
)


@dataclass(frozen=True)
class Place:
    """Where a run goes on.

    Args:
        devices: Numbers of GPUs; none for the CPU.
        cores: Reading images would take all.
    """

    devices: tuple[int, ...]
    cores: tuple[int, ...]


def at_once(tasks: Sequence[Task], devices: int) -> Iterator[list[tuple[Task, Place]]]:
    """Split the runs of a round into those that go on at the same time, and the machine among them.

    Args:
        tasks: The runs.
        devices: GPUs; 0 for the CPU alone.
    """
    cores = sorted(os.sched_getaffinity(0))
    most = max(1, devices)
    for first in range(0, len(tasks), most):
        group = tasks[first : first + most]
        gpus, each = devices // len(group), max(1, usable_cpus() // len(group))
        yield [
            (
                task,
                Place(
                    tuple(range(k * gpus, (k + 1) * gpus)),
                    tuple(cores[k * each : (k + 1) * each] or cores),
                ),
            )
            for k, task in enumerate(group)
        ]


@dataclass(frozen=True)
class Trainer:
    """Trains runs.

    Args:
        data: The images.
        runs: A folder for each run.
        others: Checkpoints that teach beside the runs.
        more: Options for each run.
        archives: Where the checkpoint and the logs of a finished run go as NAME.tar, if anywhere.
    """

    data: Path
    runs: Path
    others: list[Path]
    more: list[str]
    archives: Path | None

    def train(self, task: Task, place: Place) -> bool:
        """Train one run, and return whether it came to its end."""
        out = self.runs / task.name
        call = [sys.executable, "-m", "mambamic", "train", str(self.data), "--out", str(out)]
        call += ["--arch", task.architecture, "--seed", str(task.seed), *self.more]
        call += ["--devices", str(max(1, len(place.devices)))]
        if task.teachers:
            checkpoints = [self.runs / name / RESULT for name in task.teachers]
            call += ["--teachers", *map(str, [*checkpoints, *self.others])]
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, place.devices))}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(gpus if place.devices else {})}
        os.sched_setaffinity(0, place.cores)  # of this thread and what it starts
        begun = time.monotonic()
        with out.with_suffix(".log").open("a") as log:
            ended = subprocess.run(call, stdout=log, stderr=log, env=environment).returncode
        print(f"{task.name}: status {ended} after {time.monotonic() - begun:.0f} s", flush=True)
        if ended == 0 and self.archives is not None:
            _archive(out, self.archives)
        return ended == 0

    def train_all(self, devices: int) -> bool:
        """Train all runs, up to a group in which one fails; return whether none did."""
        self.runs.mkdir(parents=True, exist_ok=True)
        for tasks in ROUNDS:
            for group in at_once(tasks, devices):
                with ThreadPoolExecutor(len(group)) as pool:
                    if not all(list(pool.map(self.train, *zip(*group, strict=True)))):
                        return False
        return True


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
    trainer = Trainer(args.data, args.runs, args.teachers, more, args.archives)
    return 0 if trainer.train_all(args.devices) else 1


if __name__ == "__main__":
    sys.exit(main())
