"""Requests and tiles per second over HTTP, beside bare TorchServe and beside the parts alone.

One run measures TorchServe with a handler that does nothing, this server with one image per request
and with 64 in a ZIP, what all cores decode, and what ``Classifier`` does with decoded tiles. The
load comes from wrk (Debian's package), which needs a core or two of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
from PIL import Image

from benchmarks.common import write
from mambamic import Classifier
from mambamic.checkpoint import load_checkpoint
from mambamic.decoding import DecodePool, decode_pixels

_TILES = 64
_MEASURED = ("null", "single", "zip")  # without one of them only rates are printed, and no ratio
_SIDE = 224
_BOUNDARY = "----------mambamic"
_NULL_HANDLER = """
class NullHandler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [b"{}"] * len(data)
"""
# Each connection sends the bodies one after the other, beginning with another one.
_WRK_SCRIPT = """
local bodies, turn = {}, 0
local threads = 0
function setup(thread) thread:set("number", threads); threads = threads + 1 end
function init(args)
  for _, name in ipairs(args) do
    local file = io.open(name, "rb"); bodies[#bodies + 1] = file:read("*a"); file:close()
  end
  turn = number * 7
end
function request()
  turn = turn + 1
  return wrk.format("POST", nil, {["Content-Type"] = "multipart/form-data; boundary=BOUNDARY"},
    bodies[turn % #bodies + 1])
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
""".replace("BOUNDARY", _BOUNDARY)

Row = dict[str, Any]


def tiles(data: Path, number: int) -> list[bytes]:
    """Return real cells as JPEG files of 224 x 224 pixels."""
    with zipfile.ZipFile(data) as stored:
        names = [name for name in stored.namelist() if not name.endswith("/")][:number]
        found = []
        for name in names:
            image = Image.open(io.BytesIO(stored.read(name))).convert("RGB")
            out = io.BytesIO()
            image.resize((_SIDE, _SIDE)).save(out, "jpeg", quality=90)
            found.append(out.getvalue())
    return found


def form(content: bytes) -> bytes:
    """Return a multipart body with one file."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n'
    kind = "Content-Type: application/octet-stream\r\n\r\n"
    return (head + kind).encode() + content + f"\r\n--{_BOUNDARY}--\r\n".encode()


def zipped(images: list[bytes]) -> bytes:
    """Return a ZIP of images."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, image in enumerate(images):
            archive.writestr(f"{number}.jpg", image)
    return out.getvalue()


def wait_until_idle(url: str, body: bytes) -> None:
    """Return when a server has done what an earlier load left behind.

    wrk hangs up with a request under way on each connection, which the server still works on. One
    that is sent now waits for all of these.
    """
    kind = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    urllib3.request("POST", url, body=body, headers=kind, retries=False, timeout=60)


def load(wrk: str, url: str, bodies: list[bytes], connections: int, seconds: int) -> Row:
    """Send requests from many connections, and return their rate and times."""
    wait_until_idle(url, bodies[0])
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "load.lua")
        script.write_text(_WRK_SCRIPT)
        files = []
        for number, body in enumerate(bodies):
            files.append(Path(folder, str(number)))
            files[-1].write_bytes(body)
        threads = min(4, connections)
        call = [wrk, f"-t{threads}", f"-c{connections}", f"-d{seconds}", "--timeout", "60"]
        done = subprocess.run(
            [*call, "-s", str(script), url, "--", *map(str, files)],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert found is not None, done.stdout
    requests, took, p50, p99, errors = map(int, found.groups())
    return {
        "connections": connections,
        "requests_per_second": round(requests / took * 1e6, 1),
        "p50_ms": p50 / 1e3,
        "p99_ms": p99 / 1e3,
        "errors": errors,
    }


@contextmanager
def bare(port: int, workers: int, batch_size: int) -> Iterator[str]:
    """Run TorchServe with a handler that does nothing, as its own documents start it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = {"modelName": "null", "handler": "null_handler.py", "modelVersion": "1.0"}
        manifest = {"createdOn": "", "runtime": "python", "model": model, "archiverVersion": "0.12"}
        config = f"minWorkers: {workers}\nmaxWorkers: {workers}\nbatchSize: {batch_size}\n"
        with zipfile.ZipFile(folder / "null.mar", "w") as archive:
            manifest["model"] = {**model, "configFile": "model-config.yaml"}
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            archive.writestr("model-config.yaml", config + "maxBatchDelay: 1\n")
            archive.writestr("null_handler.py", _NULL_HANDLER)
        addresses = zip(("inference", "management", "metrics"), range(port, port + 3), strict=True)
        lines = [f"{kind}_address=http://127.0.0.1:{number}" for kind, number in addresses]
        lines += ["load_models=null.mar", "disable_token_authorization=true", "job_queue_size=1000"]
        (folder / "config.properties").write_text("\n".join(lines) + "\n")
        call = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
        call += ["--model-store", name, "--ts-config", str(folder / "config.properties")]
        with (folder / "console").open("wb") as console:
            server = subprocess.Popen(
                call, cwd=folder, stdout=console, stderr=console,
                env={**os.environ, "TMPDIR": name}, start_new_session=True,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}/predictions/null"
            _wait(url, form(b"x"))
            yield url
        finally:
            os.killpg(server.pid, 9)
            server.wait()


def _wait(url: str, body: bytes) -> None:
    for _ in range(300):
        try:
            kind = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
            if urllib3.request("POST", url, body=body, headers=kind, retries=False).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{url} does not answer")


@contextmanager
def ours(checkpoint: Path, port: int, settings: dict[str, Any]) -> Iterator[str]:
    """Run this server, as its own documents start it."""
    call = [sys.executable, "-m", "mambamic", "serve"]
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    start = [*call, "--model", str(checkpoint), "--port", str(port), *asked]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}/predictions/mambamic"
    finally:
        subprocess.run([*call, "--stop", "--port", str(port)], check=True)


def decoding(checkpoint: Path, images: list[bytes], seconds: float) -> float:
    """Return the images per second that a process per core decodes and brings to size."""
    preprocess = load_checkpoint(checkpoint).config.preprocess
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        work = partial(_decode_for, preprocess, images)
        list(pool.map(work, [0.5] * cores))  # every process has started
        return sum(pool.map(work, [seconds] * cores))


def _decode_for(preprocess: Any, images: list[bytes], seconds: float) -> float:
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        decode_pixels(preprocess, images[count % len(images)])
        count += 1
    return count / (time.perf_counter() - begun)


def classifying(checkpoint: Path, images: list[bytes], device: str, seconds: float) -> float:
    """Return the images per second of ``Classifier`` alone, from decoded tiles, by 256."""
    classifier = Classifier.load(checkpoint, device=device)
    with DecodePool(classifier.preprocess) as pool:
        decoded = pool.map(images)
    pixels = [item for item in decoded if isinstance(item, np.ndarray)]
    number = 256 if classifier.describe()["device"].startswith("cuda") else _TILES
    batch = np.stack([pixels[index % len(pixels)] for index in range(number)])
    classifier.probabilities(batch)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        classifier.probabilities(batch)
        count += number
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Measure one after the other, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path, help="a zip of images")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="beside 1")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--only", nargs="+", default=list(_MEASURED), choices=_MEASURED)
    parser.add_argument("--decoders", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--wrk", default=shutil.which("wrk"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.wrk is None:
        raise SystemExit("wrk is not installed: apt-get install wrk, or give --wrk")
    images = tiles(args.images, 256)
    single = [form(image) for image in images]
    parts = [images[start : start + _TILES] for start in range(0, len(images), _TILES)]
    many = [form(zipped(part)) for part in parts if len(part) == _TILES]
    rows: list[Row] = []

    def measure(server: str, url: str, workers: int, bodies: list[bytes], tiles_each: int) -> None:
        for connections in args.connections:
            load(args.wrk, url, bodies, connections, 2)
            row = load(args.wrk, url, bodies, connections, args.seconds)
            rows.append({"server": server, "workers": workers, "tiles": tiles_each, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    for workers in sorted({1, *args.workers}):
        if "null" in args.only:
            with bare(args.port, workers, args.batch_size) as url:
                measure("null", url, workers, single, 1)
        if not {"single", "zip"} & set(args.only):
            continue
        settings = {name: getattr(args, name) for name in ("batch_size", "decoders", "device")}
        with ours(args.checkpoint, args.port, {"workers": workers, **settings}) as url:
            if "single" in args.only:
                measure("mambamic", url, workers, single, 1)
            if "zip" in args.only:
                measure("mambamic", url, workers, many, _TILES)
    if set(args.only) != set(_MEASURED):
        return
    decode = decoding(args.checkpoint, images, args.seconds)
    classify = classifying(args.checkpoint, images, args.device, args.seconds)

    def best(server: str, each: int, workers: int | None = None) -> float:
        rates = [
            row["requests_per_second"] * each
            for row in rows
            if (row["server"], row["tiles"]) == (server, each) and workers in (None, row["workers"])
        ]
        return float(max(rates))

    write(
        {
            "format": f"JPEG, {_SIDE} x {_SIDE}, {sum(map(len, images)) // len(images)} bytes",
            "batch_size": args.batch_size,
            "decoders": args.decoders,
            "cores": len(os.sched_getaffinity(0)),
            "rows": rows,
            "decode_images_per_second": round(decode),
            "classify_images_per_second": round(classify),
            # TorchServe's own default is one worker for each GPU; more need more of the processor.
            "single_to_null_of_one_worker": round(best("mambamic", 1) / best("null", 1, 1), 3),
            "single_to_null": round(best("mambamic", 1) / best("null", 1), 3),
            "zip_to_parts": round(best("mambamic", _TILES) / min(decode, classify), 3),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
