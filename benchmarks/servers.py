"""This server beside LitServe and BentoML, with the same model on a CPU: speed, and faults.

All are up at once and are loaded in turn, round after round, by one generator (wrk, Debian's
package): what else the machine does meets each of them alike. Those whose turn it is not are
stopped meanwhile, as some are busy while they wait, at the cost of the one that is measured. The
processor time that a server's processes spend on a request is given too: it says more than the
clock where the machine has other work. The peers are installed into environments of their own;
their settings are in ``benchmarks/peers``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import write
from benchmarks.peers import faults
from benchmarks.peers.running import PEERS, Running, ours, peer, prepare, versions
from benchmarks.peers.running import wait_until_it_predicts as wait
from benchmarks.serving import Row, form, load, tiles


def speed(
    servers: Sequence[Running],
    bodies: list[bytes],
    args: argparse.Namespace,
) -> list[Row]:
    """Return each round's figures, of each server at each number of connections."""
    rows = []
    for server in servers:  # compilers and caches: nobody is measured in its first seconds
        load(args.wrk, server.url, bodies, 8, 15)
    for round_number in range(args.rounds):
        for connections in args.connections:
            # Nobody is always the first, whose processor is the coolest.
            turn = round_number % len(servers)
            for server in [*servers[turn:], *servers[:turn]]:
                with _stopped([other for other in servers if other is not server]):
                    load(args.wrk, server.url, bodies, connections, 2)
                    before = server.cpu_seconds()
                    row = load(args.wrk, server.url, bodies, connections, args.seconds)
                answered = max(1.0, row["requests_per_second"] * args.seconds)
                spent = round((server.cpu_seconds() - before) * 1e3 / answered, 1)
                row |= {"server": server.name, "round": round_number, "cpu_ms": spent}
                rows.append(row)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


@contextmanager
def _stopped(servers: Sequence[Running]) -> Iterator[None]:
    # One may be gone already: TorchServe starts a process every minute that looks at the machine.
    processes = [process for server in servers for process in server.family()]
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.resume()


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return the medians over the rounds, and how far the rounds differ."""
    kinds = dict.fromkeys((row["connections"], row["server"]) for row in rows)
    found = []
    for connections, server in kinds:
        own = [r for r in rows if (r["connections"], r["server"]) == (connections, server)]
        rates = [row["requests_per_second"] for row in own]
        tails = [row["p99_ms"] for row in own]
        spent = [row["cpu_ms"] for row in own]
        found.append(
            {
                "server": server,
                "connections": connections,
                "requests_per_second": round(statistics.median(rates), 1),
                "requests_per_second_range": [min(rates), max(rates)],
                "p99_ms": round(statistics.median(tails)),
                "p99_ms_range": [round(min(tails)), round(max(tails))],
                "cpu_ms_per_request": round(statistics.median(spent), 1),
                "cpu_ms_per_request_range": [min(spent), max(spent)],
                "errors": sum(row["errors"] for row in own),
            }
        )
    return found


def main() -> None:
    """Measure speed, then faults, and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, help="a zip of images")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--environments", type=Path, default=Path("build/peers"))
    parser.add_argument("--only", choices=("speed", "faults"))
    parser.add_argument("--wrk", default=shutil.which("wrk"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.wrk is None:
        raise SystemExit("wrk is not installed: apt-get install wrk, or give --wrk")
    images = tiles(args.images, 64)
    pythons = {name: prepare(name, args.environments.absolute()) for name in PEERS}
    results: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "peers": {name: versions(python) for name, python in pythons.items()},
        "image": f"JPEG, 224 x 224, {sum(map(len, images)) // len(images)} bytes",
    }
    if args.only != "faults":
        with tempfile.TemporaryDirectory(prefix="m-") as state, ExitStack() as stack:
            servers = [stack.enter_context(ours(args.checkpoint, args.port, Path(state)))]
            for number, (name, python) in enumerate(pythons.items(), 1):
                running = peer(name, python, args.checkpoint, args.port + 10 * number)
                servers.append(stack.enter_context(running))
            for server in servers:
                if not wait(server, images[0]):
                    raise SystemExit(f"{server.name} does not predict")
            rows = speed(servers, [form(image) for image in images], args)
        results |= {"speed": summary(rows), "rounds": rows}
    if args.only != "speed":
        results["faults"] = faults.measure(args.checkpoint, pythons, images[0], args.port)
    write(results, args.out)


if __name__ == "__main__":
    main()
