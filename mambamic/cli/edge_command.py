"""``mambamic edge``: nginx in front of servers."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from mambamic.edge import capacity, nginx
from mambamic.edge.settings import EdgeSettings, Upstream, read_tokens

DESCRIPTION = """\
Put nginx in front of one or several servers: limits that answer 429, tokens, TLS, a second try on
another server where a worker was killed, and a page that classifies an image. Called again with
the same --port it changes the edge that runs there, and no request is lost.

example:
  mambamic serve --port 8080 && mambamic serve --port 8090
  mambamic edge --upstream 127.0.0.1:8080 --upstream 127.0.0.1:8090 --port 8000
  curl -F image=@examples/cell.png http://127.0.0.1:8000/predictions/mambamic
  mambamic edge --stop
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic edge``."""
    usual = EdgeSettings((Upstream("127.0.0.1", 8080),))
    parser.description = DESCRIPTION
    add = parser.add_argument
    add(
        "--upstream",
        action="append",
        metavar="HOST:PORT",
        help="a server; repeat for several (default: 127.0.0.1:8080)",
    )
    add("--port", type=int, default=usual.port, help="of the edge (default: %(default)s)")
    add("--host", default=usual.host, help="address of the edge (default: %(default)s)")
    add("--certificate", type=Path, metavar="PEM", help="for TLS, with its chain")
    add("--key", type=Path, metavar="PEM", help="the certificate's")
    add("--tokens", type=Path, metavar="FILE", help="one a line; others get 401 (default: off)")
    add(
        "--in-flight",
        type=int,
        metavar="N",
        help="predictions that each server is given at a time; more get 429 (default: 6 for each "
        "worker on a CPU, two batches for each on a GPU)",
    )
    add(
        "--client-rate",
        type=int,
        default=usual.client_rate,
        help="requests a second from one address; more get 429 (default: %(default)s)",
    )
    add(
        "--client-connections",
        type=int,
        default=usual.client_connections,
        help="requests at a time from one address; more get 429 (default: %(default)s)",
    )
    add(
        "--max-body",
        type=int,
        default=usual.max_body,
        metavar="MIB",
        help="larger ones get 413 (default: %(default)s)",
    )
    add(
        "--timeout",
        type=int,
        default=usual.timeout,
        metavar="S",
        help="seconds for an answer; later there is a 504 (default: %(default)s)",
    )
    add(
        "--model",
        default=usual.model,
        metavar="NAME",
        help="what the page and /ready ask (default: %(default)s)",
    )
    add(
        "--write",
        type=Path,
        metavar="FOLDER",
        help="only write what nginx reads, for a container or a service of your own",
    )
    add("--foreground", action="store_true", help="stay, and log to the console, until a signal")
    add("--stop", action="store_true", help="stop the edge on --port")


def run(args: argparse.Namespace) -> int:
    """Write, start, change or stop an edge."""
    if args.stop:
        was_running = nginx.stop(args.port, _warn)
        found = (
            f"edge on port {args.port} stopped" if was_running else f"no edge on port {args.port}"
        )
        print(found)
        return 0
    settings = EdgeSettings(
        upstreams=tuple(_upstreams(args)),
        port=args.port,
        host=args.host,
        certificate=args.certificate,
        key=args.key,
        tokens=None if args.tokens is None else read_tokens(args.tokens),
        client_rate=args.client_rate,
        client_connections=args.client_connections,
        max_body=args.max_body,
        timeout=args.timeout,
        model=args.model,
        console=args.foreground,
    )
    if args.write is not None:
        nginx.write(settings, args.write)
        print(
            f"nginx -p {args.write.absolute()}/ -c {args.write.absolute() / nginx.CONF} -e stderr"
        )
        return 0
    for upstream in settings.upstreams:
        _knock(upstream)
    if args.foreground:
        return _stay(settings)
    was_running = nginx.start(settings, _warn)
    folder = nginx.EdgeFolder.of_port(settings.port)
    print(
        f"{'changed' if was_running else 'started'}: {_address(settings)} in front of "
        + ", ".join(f"{one.address} (up to {one.in_flight})" for one in settings.upstreams)
        + ("; no token is asked for" if settings.tokens is None else "; for those with a token")
        + f"; logs in {folder.logs}; stop by: mambamic edge --stop --port {settings.port}"
    )
    return 0


def _upstreams(args: argparse.Namespace) -> list[Upstream]:
    given = [Upstream.parse(text) for text in args.upstream or ["127.0.0.1:8080"]]
    if args.in_flight is None:
        return [capacity.measured(upstream) for upstream in given]
    return [Upstream(upstream.host, upstream.port, args.in_flight) for upstream in given]


def _knock(upstream: Upstream) -> None:
    """Warn where nobody listens: it may be about to start, or its address be wrong."""
    try:
        socket.create_connection((upstream.host, upstream.port), timeout=2).close()
    except OSError as error:
        said = error.strerror or error
        _warn(
            f"nobody answers at {upstream.address} now ({said}): until somebody does, its requests "
            "go to another server, or get 503 where there is none"
        )


def _address(settings: EdgeSettings) -> str:
    scheme = "http" if settings.certificate is None else "https"
    return f"{scheme}://{settings.host}:{settings.port}/"


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _stay(settings: EdgeSettings) -> int:
    """Run nginx as a child; what ends this process gently ends it gently."""
    folder = nginx.EdgeFolder.of_port(settings.port)
    found = nginx.find_nginx()
    nginx.prepare(settings, folder, found)
    user = " ".join(nginx.as_this_user()[1:])
    command = folder.command(found, "-g", f"daemon off; {user}")
    child = subprocess.Popen(command, start_new_session=True)

    def quit_gently(number: int, frame: FrameType | None) -> None:
        del number, frame
        child.send_signal(signal.SIGQUIT)

    signal.signal(signal.SIGTERM, quit_gently)
    signal.signal(signal.SIGINT, quit_gently)
    print(f"{_address(settings)}, until a signal", flush=True)
    return child.wait()
