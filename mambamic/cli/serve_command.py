"""``mambamic serve``: start a server, and stop it."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from mambamic.backends import SCAN_BACKENDS
from mambamic.errors import ServerError, UsageError
from mambamic.handlers.gate import Gate
from mambamic.launcher import probe, server, stopping
from mambamic.launcher.archives import ModelSpec
from mambamic.launcher.settings import Settings, default_batch_size, default_workers

DESCRIPTION = """\
Serve models over HTTP with TorchServe. Ends when the first prediction has been answered; the
server runs on in the background. Predictions are answered on --port, the management API,
TorchServe's metrics and ours on the three ports after it, on loopback only.

example:
  mambamic serve --model model_store/mambamic_t_pbc
  curl http://127.0.0.1:8080/predictions/mambamic -F image=@examples/cell.png
  mambamic serve --stop
"""
DEMO = "model_store/mambamic_t_pbc"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic serve``."""
    defaults = Settings()
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="SOURCE[=NAME[:VERSION]]",
        help=f"a checkpoint folder or .mar archive; repeat for several (default: {DEMO})",
    )
    add("--port", type=int, default=defaults.port, help="of predictions (default: %(default)s)")
    add("--host", default=defaults.host, help="address of predictions (default: %(default)s)")
    add("--workers", type=int, help="processes per model (default: two for each GPU, else one)")
    add("--device", choices=("auto", "cpu", "cuda"), default=defaults.device)
    add("--backend", choices=SCAN_BACKENDS, default=defaults.backend, help="of the scan")
    add(
        "--batch-size", type=int, help="requests per batch, at most (default: 32 for a GPU, else 8)"
    )
    add(
        "--max-batch-delay",
        type=int,
        default=defaults.max_batch_delay,
        metavar="MS",
        help="milliseconds to wait for a batch to fill",
    )
    add(
        "--decoders",
        type=int,
        default=defaults.decoders,
        metavar="N",
        help="processes of each worker that decode images (default: none, its threads do)",
    )
    add("--token-auth", action="store_true", help="require TorchServe's tokens (key_file.json)")
    add("--log-dir", type=Path, help="where to log (default: in the server's state folder)")
    add("--foreground", action="store_true", help="stay, and log to the console, until a signal")
    add("--stop", action="store_true", help="stop the server on --port")
    add(
        "--drain",
        type=float,
        default=stopping.DRAIN_TIMEOUT_S,
        metavar="S",
        help="seconds that a stop leaves requests in flight (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Start or stop a server."""
    if args.stop:
        return _stop(args.port, args.drain)
    settings = Settings(
        port=args.port,
        host=args.host,
        workers=default_workers(args.device) if args.workers is None else args.workers,
        device=args.device,
        backend=args.backend,
        token_auth=args.token_auth,
        batch_size=(
            default_batch_size(args.device) if args.batch_size is None else args.batch_size
        ),
        max_batch_delay=args.max_batch_delay,
        decoders=args.decoders,
        foreground=args.foreground,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    sample, shown = _sample()
    with server.starting(_models(args.model), settings, args.log_dir) as started:
        answers = server.wait_ready(started, sample)
    seconds = time.monotonic() - began
    address = f"http://{probe.reachable(settings.host)}:{settings.port}"
    names = [model.name for model in started.models]
    header = _token_header(started) if settings.token_auth else ""
    for model, answer in zip(started.models, answers, strict=True):
        path = model.path if names.count(model.name) > 1 else f"/predictions/{model.name}"
        print(f"$ curl {address}{path} -F image=@{shown}{header}")
        print(answer, flush=True)
    if settings.token_auth:
        print(f"tokens, which expire after an hour, are in {started.folder.keys}", flush=True)
    print(f"metrics at http://127.0.0.1:{settings.exporter_port}/metrics", flush=True)
    print(
        f"first answer after {seconds:.1f} s; logs in {started.record.logs}; "
        f"stop by: mambamic serve --stop --port {settings.port}",
        flush=True,
    )
    return _stay(started, args.drain) if args.foreground else 0


def _models(given: list[str] | None) -> list[ModelSpec]:
    if given:
        return [ModelSpec.parse(text) for text in given]
    root = Path(__file__).resolve().parent.parent.parent
    for demo in (Path(DEMO), root / DEMO):
        if (demo / "config.json").exists():
            return [ModelSpec(demo)]
    raise UsageError(
        "no --model, and the demo checkpoint is not here",
        f"a checkpoint folder or archive, or {DEMO} below the working directory",
        "name one: mambamic serve --model CHECKPOINT",
    )


def _sample() -> tuple[bytes, str]:
    root = Path(__file__).resolve().parent.parent.parent
    for sample in (Path("examples/cell.png"), root / "examples" / "cell.png"):
        if sample.exists():
            return sample.read_bytes(), str(sample)
    return probe.draw_cell(), "cell.png"


def _token_header(started: server.Server) -> str:
    """Return what makes a curl line read the token at the time that it is used."""
    script = "import json, sys; print(json.load(open(sys.argv[1]))['inference']['key'])"
    key = f'$(python3 -c "{script}" {shlex.quote(str(started.folder.keys))})'
    return f' -H "Authorization: Bearer {key}"'


def _stop(port: int, drain: float) -> int:
    was_running = stopping.stop(port, drain, say=lambda text: print(text, file=sys.stderr))
    print(f"server on port {port} stopped" if was_running else f"no server on port {port}")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def _stay(started: server.Server, drain: float) -> int:
    port = started.settings.port
    try:
        while started.record.process() is not None:
            server.keep_exporter(started)
            time.sleep(0.5)
    except KeyboardInterrupt:
        # Once is enough: a second signal must not end the stopping half-way.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return _stop(port, drain)
    if Gate(started.folder.gate).closed:
        return 0
    stopping.stop(port)
    raise ServerError(
        "TorchServe's frontend ended by itself",
        "a Java process that stays",
        f"see the logs in {started.record.logs}",
    )
