"""Several devices: one process for each, started and watched over by the one that was called."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from mambamic.errors import MambamicError, TrainingError
from mambamic.machine import usable_cpus
from mambamic.training.share import Share

_TIMEOUT = timedelta(minutes=10)  # the difference in time that processes may read images for
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, all in one exchange.

    Args:
        tensors: Of one type and device, in the same order everywhere.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        torch._foreach_copy_(
            list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        )


def run_ranks(work: Callable[[Share], None], ranks: int, kind: str) -> None:
    """Run the same work in several new processes, each with its share, until all are done.

    Where one fails or this process is stopped, all are killed.

    Args:
        work: Can be pickled; ``torch.distributed`` is ready when it is called.
        ranks: How many processes.
        kind: Of device, ``cpu`` or ``cuda``; process k gets the k-th.

    Raises:
        MambamicError: What the first process to fail raised.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM.
    """
    context = get_context("spawn")
    processes: dict[SpawnProcess, connection.Connection] = {}
    with _stopped_by_sigterm(), TemporaryDirectory() as folder:
        try:
            with _ignoring_sigint():  # inherited: Ctrl-C at a terminal reaches all at once
                for rank in range(ranks):
                    receiver, sender = context.Pipe(duplex=False)
                    given = (work, Share(rank, ranks), kind, Path(folder, "meeting"), sender)
                    process = context.Process(target=_one, args=given)
                    process.start()
                    sender.close()
                    processes[process] = receiver
            _wait(processes)
        finally:
            for process, receiver in processes.items():
                process.kill()
                process.join()
                receiver.close()


def _wait(processes: dict[SpawnProcess, connection.Connection]) -> None:
    """Wait until all have ended well, or until the first that has not."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = [running.pop(s) for s in connection.wait(list(running)) if isinstance(s, int)]
        for process in ended:
            process.join()  # its status is known only then
        failed = [process for process in ended if process.exitcode != 0]
        if failed:
            raise _reason([(process, processes[process]) for process in failed])


def _reason(failed: list[tuple[SpawnProcess, connection.Connection]]) -> MambamicError:
    told = [_told(*each) for each in failed]
    for reason in told:
        if isinstance(reason, MambamicError):
            return reason
    return TrainingError(
        f"one of the processes failed: {told[0]}",
        "processes that all train to the end",
        "see the reason; the same command goes on after the last finished epoch",
    )


def _told(process: SpawnProcess, receiver: connection.Connection) -> MambamicError | str:
    try:
        reason: MambamicError | str = receiver.recv()
    except EOFError:
        return f"process {process.pid} ended with status {process.exitcode}"
    return reason


def _one(
    work: Callable[[Share], None],
    share: Share,
    kind: str,
    meeting: Path,
    parent: connection.Connection,
) -> None:
    """Do the work in this new process, and tell the parent what goes wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Its own lock is one between processes, which would be left behind where this one is killed.
    tqdm.set_lock(threading.RLock())
    try:
        _join(share, kind, meeting)
        work(share)
        distributed.destroy_process_group()
    except MambamicError as error:
        parent.send(error)
    except BaseException:
        parent.send(traceback.format_exc())
    else:
        return
    # At once: an orderly end would wait for processes that wait for this one.
    parent.close()
    os._exit(1)


def _join(share: Share, kind: str, meeting: Path) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # all on this machine
    device = None
    if kind == "cuda":
        device = torch.device(kind, share.rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, usable_cpus() // share.ranks))
    distributed.init_process_group(
        _BACKENDS[kind],
        init_method=meeting.as_uri(),  # through a file: no port that another program may take
        rank=share.rank,
        world_size=share.ranks,
        timeout=_TIMEOUT,
        device_id=device,
    )


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _ignoring_sigint() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise, so that no process is left behind."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
