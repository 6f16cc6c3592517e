"""Work for several processes, of which each imports this module, and not what trains."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from torch import distributed

from mambamic.errors import DataError
from mambamic.training.ranks import average_over_ranks, run_ranks
from mambamic.training.share import Share


def average(folder: Path, share: Share) -> None:
    torch.manual_seed(share.rank)
    assert distributed.get_rank() == share.rank
    tensors = [torch.rand(3, 2), torch.rand(4)]
    torch.save(tensors, folder / f"before_{share.rank}.pt")
    average_over_ranks(tensors)
    torch.save(tensors, folder / f"after_{share.rank}.pt")


def fail(how: str, folder: Path, share: Share) -> None:
    (folder / f"{os.getpid()}").touch()
    if share.rank == 0:
        distributed.barrier()  # for ever: the other never comes
    if how == "told":
        raise DataError("no images", "some", "add them")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("surprise")


def idle(folder: Path, share: Share) -> None:
    (folder / f"{os.getpid()}").touch()
    time.sleep(300)


def start_idle(folder: Path) -> None:
    run_ranks(partial(idle, folder), 2, "cpu")
