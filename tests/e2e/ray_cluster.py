"""A Ray cluster of two nodes and a run on it, in the network namespace that this script runs in.

Ray listens on all addresses; here there is only the loopback of a namespace of its own. Called by
``test_slides_ray.py`` as ``python ray_cluster.py FOLDER KILL ARGUMENT...``: the arguments are those
of ``mambamic score``; KILL names the kinds of process, of each of which one is killed on the way,
``reader`` or ``model`` or both, with a comma, or none. It exits as the run does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time

import psutil

ADDRESS = "127.0.0.1:6379"
NAMES = {"model": "Map(_Model)", "reader": "Map(_read)"}


def loopback_up() -> None:
    """Do what ``ip link set lo up`` does, which needs a package of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", 1 | 64)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def start_nodes(folder: str) -> None:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address", "127.0.0.1"]
    ray += ["--num-cpus", "1", "--object-store-memory", "200000000", "--disable-usage-stats"]
    # Neither logs nor more nodes are asked for: each would be another process on each node.
    ray += ["--include-log-monitor", "false"]
    head = ["--head", "--no-monitor", "--port", "6379", "--include-dashboard", "false"]
    head += ["--temp-dir", folder]
    for more in (head, ["--address", ADDRESS]):
        done = subprocess.run(
            [*ray, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stdout)


def kill_one(kind: str, run: subprocess.Popen[bytes]) -> bool:
    """Kill a process of the cluster once it works."""
    while run.poll() is None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                called = " ".join(process.cmdline())
                # Ray names a process by what it does: a model that is being loaded has not worked.
                working = NAMES[kind] in called and not called.endswith("__init__")
                if called.startswith("ray::") and working:
                    process.send_signal(signal.SIGKILL)
                    return True
        time.sleep(0.02)
    return False


def main() -> int:
    folder, kinds, *arguments = sys.argv[1:]
    loopback_up()
    start_nodes(folder)
    command = [sys.executable, "-m", "mambamic", "score", *arguments, "--ray", ADDRESS]
    with subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": ADDRESS}) as run:
        for kind in filter(None, kinds.split(",")):
            if not kill_one(kind, run):
                sys.exit(f"the run ended before a {kind} could be killed")
        return run.wait()


if __name__ == "__main__":
    sys.exit(main())
