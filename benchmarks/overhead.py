"""What handler and edge add to bare TorchServe, where the model takes no time and decoding none.

Three servers run at once and are asked in turn, one request at a time: TorchServe with a handler
that does nothing; this server, whose network is replaced by one that returns constants and whose
decoder by one that returns the same pixels; and the same behind the edge. All the rest of the way
is the real one: the request is read, counted, classified in a batch, answered in words. A fourth
forms no batches: by how much it is faster is how long a lone request waits for one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.peers.running import Running, ours
from benchmarks.serving import bare, form, load, tiles
from mambamic.export.archive import HANDLER_FILE, write_archive

_NULL_MODEL = '''
import numpy as np

from mambamic.decoding import Timed
from mambamic.handlers.service import ImageClassifier


class NullClassifier(ImageClassifier):
    """Everything but the decoder and the network."""

    def initialize(self, context):
        super().initialize(context)
        rows = self._classifier.outputs(np.zeros((1, SIDE, SIDE, 3), np.uint8))
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        self._classifier.outputs = lambda tiles: tuple(row.repeat(len(tiles), 0) for row in rows)
        self._pool.timed = lambda blobs: [Timed(pixels, 1e-3, 1e-3)] * len(blobs)
'''
_SIDE = 224
_PER_ROUND = 3
# Java compiles what is called often, ours only what is called very often.
_WARM_UP = {"connections": 16, "seconds": 15}


def null_archive(checkpoint: Path, folder: Path) -> Path:
    """Return an archive of the checkpoint whose handler has neither decoder nor network."""
    real = write_archive(checkpoint, folder / "real.mar", model_name="mambamic", version="1.0")
    null = folder / "null.mar"
    with zipfile.ZipFile(real) as source, zipfile.ZipFile(null, "w") as target:
        for info in source.infolist():
            handler = info.filename == HANDLER_FILE
            text = _NULL_MODEL.replace("SIDE", str(_SIDE)).encode()
            target.writestr(info, text if handler else source.read(info))
    return null


@contextmanager
def edge(server: Running, port: int, state: Path) -> Iterator[str]:
    """Run the edge in front of a server, with its defaults."""
    call = [sys.executable, "-m", "mambamic", "edge", "--port", str(port)]
    variables = {**os.environ, "MAMBAMIC_STATE": str(state)}
    quiet: dict[str, Any] = {"env": variables, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*call, "--upstream", f"127.0.0.1:{server.port}"], **quiet)
    try:
        yield f"http://127.0.0.1:{port}/predictions/mambamic"
    finally:
        subprocess.run([*call, "--stop"], **quiet)


def main() -> None:
    """Measure round after round, and print the differences of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, help="a zip of images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--wrk", default=shutil.which("wrk"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.wrk is None:
        raise SystemExit("wrk is not installed: apt-get install wrk, or give --wrk")
    images = tiles(args.images, 16)
    bodies = [form(image) for image in images]
    rounds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="m-") as name, ExitStack() as stack:
        folder = Path(name)
        archive = null_archive(args.checkpoint, folder)
        server = stack.enter_context(ours(archive, args.port, folder))
        unbatched = stack.enter_context(ours(archive, args.port + 10, folder, "--batch-size", "1"))
        urls = {
            "bare TorchServe": stack.enter_context(bare(args.port + 20, 1, 32)),
            "this server": server.url,
            "this server behind the edge": stack.enter_context(
                edge(server, args.port + 30, folder)
            ),
            "this server without batches": unbatched.url,
        }
        for url in urls.values():
            load(args.wrk, url, bodies, **_WARM_UP)
        for _ in range(args.rounds):
            for kind, url in urls.items():
                row = load(args.wrk, url, bodies, 1, _PER_ROUND)
                if row["errors"]:
                    raise SystemExit(f"{kind} gave errors: {row}")
                rounds.setdefault(kind, []).append(row["p50_ms"])
                print(json.dumps({"server": kind, **row}), file=sys.stderr, flush=True)
    plain, own = rounds["bare TorchServe"], rounds["this server"]
    write(
        {
            "p50_ms": {kind: round(statistics.median(times), 2) for kind, times in rounds.items()},
            "handler_adds_ms": difference(own, plain),
            "handler_and_edge_add_ms": difference(rounds["this server behind the edge"], plain),
            "a_lone_request_waits_ms": difference(own, rounds["this server without batches"]),
            "rounds": rounds,
        },
        args.out,
    )


def difference(more: list[float], less: list[float]) -> float:
    """Return by how much; within a round both met the same other work."""
    return round(statistics.median(a - b for a, b in zip(more, less, strict=True)), 2)


if __name__ == "__main__":
    main()
