"""What is asked of an edge, and the files beside nginx.conf that say so."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mambamic.errors import UsageError
from mambamic.export.archive import check_label
from mambamic.launcher.settings import MAX_REQUEST_BYTES, QUEUE_SIZE

# Shorter ones can be guessed; nginx.conf has space for no longer ones.
MIN_TOKEN, MAX_TOKEN = 16, 512
# In a map of nginx what begins with ~ is a regular expression.
_TOKEN = re.compile(r"[A-Za-z0-9._+/-][A-Za-z0-9._~+/-]*=*")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_HEAD = "# Written by `mambamic edge`, which writes it anew when it is called again.\n"


@dataclass(frozen=True)
class Upstream:
    """A server behind the edge.

    Args:
        host: An IPv4 address or a name.
        port: Of predictions.
        in_flight: How many predictions it is given at a time; the rest gets 429.
    """

    host: str
    port: int
    in_flight: int = 6

    def __post_init__(self) -> None:
        _check("--in-flight", self.in_flight, 1, QUEUE_SIZE // 2)

    @classmethod
    def parse(cls, text: str) -> Upstream:
        """Read ``HOST:PORT``.

        Raises:
            UsageError: It is not that, or an IPv6 address, at which TorchServe cannot listen.
        """
        host, _, port = text.rpartition(":")
        if not _NAME.fullmatch(host) or not re.fullmatch(r"\d{1,5}", port):
            raise UsageError(
                f"--upstream {text}",
                "HOST:PORT, the host an IPv4 address or a name",
                "write, for example, 127.0.0.1:8080",
            )
        _check("--upstream", int(port), 1, 65535)
        return cls(host, int(port))

    def resolved(self) -> Upstream:
        """Return the same server by its address, as nginx would resolve its name.

        Raises:
            UsageError: The name is not known here.
        """
        try:
            address = socket.gethostbyname(self.host)
        except OSError as error:
            raise UsageError(
                f"--upstream {self.host}:{self.port}: the name is not known ({error.strerror})",
                "servers that can be told apart by their addresses",
                "give IPv4 addresses, or a single --upstream",
            ) from error
        return Upstream(address, self.port, self.in_flight)

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class EdgeSettings:
    """What ``mambamic edge`` was asked for.

    Args:
        upstreams: The servers.
        port: Where the edge answers.
        host: The address at which it does.
        certificate: Of TLS, with its chain, PEM; without it the edge speaks plain HTTP.
        key: The certificate's, PEM.
        tokens: Who may ask for predictions; None for everybody.
        client_rate: Requests a second from one address.
        client_connections: Requests at a time from one address.
        max_body: Of a request, in MiB.
        timeout: Seconds that a server has for an answer.
        model: What the page and ``/ready`` ask.
        console: Whether to log to standard output and error, not to files.
    """

    upstreams: tuple[Upstream, ...]
    port: int = 8000
    host: str = "127.0.0.1"
    certificate: Path | None = None
    key: Path | None = None
    tokens: tuple[str, ...] | None = None
    client_rate: int = 1000
    client_connections: int = 256
    max_body: int = MAX_REQUEST_BYTES >> 20
    timeout: int = 120
    model: str = "mambamic"
    console: bool = False

    def __post_init__(self) -> None:
        _check("--port", self.port, 1, 65535)
        _check("--client-rate", self.client_rate, 1, 1_000_000)
        _check("--client-connections", self.client_connections, 1, 65535)
        _check("--max-body", self.max_body, 1, MAX_REQUEST_BYTES >> 20)
        _check("--timeout", self.timeout, 1, 600)
        check_label(self.model, "1")
        if not self.upstreams:
            raise UsageError("no --upstream", "at least one server", "name one, as HOST:PORT")
        addresses = [upstream.address for upstream in self.upstreams]
        if len(set(addresses)) < len(addresses):
            raise UsageError(
                f"--upstream {', '.join(addresses)}",
                "each server once",
                "leave the repeated one out",
            )
        if (self.certificate is None) != (self.key is None):
            raise UsageError(
                "one of --certificate and --key", "both, or neither", "give the other one too"
            )
        try:
            ipaddress.ip_address(self.host)
        except ValueError as error:
            raise UsageError(
                f"--host {self.host}", "an IP address", "give 0.0.0.0 for every IPv4 address"
            ) from error


def read_tokens(path: Path) -> tuple[str, ...]:
    """Read a file of tokens: one a line; empty lines and lines that begin with # are left out.

    Raises:
        UsageError: The file cannot be read or has no token, or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--tokens {path}: {error}", "a text file with one token a line", "give its path"
        ) from error
    tokens = []
    for number, line in enumerate(lines, 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token) or not MIN_TOKEN <= len(token) <= MAX_TOKEN:
            # Not quoted: it is a secret.
            raise UsageError(
                f"--tokens {path}: line {number} is not a token",
                f"{MIN_TOKEN} to {MAX_TOKEN} letters, digits and any of ._~+/- with = at the end, "
                "and no ~ at the beginning",
                "make one by: openssl rand -hex 32",
            )
        tokens.append(token)
    if not tokens:
        raise UsageError(
            f"--tokens {path}: no token in it",
            "at least one",
            "make one by: openssl rand -hex 32, or leave --tokens out to admit everybody",
        )
    # nginx tells entries that differ in case alone not apart.
    if len({token.lower() for token in tokens}) < len(tokens):
        raise UsageError(
            f"--tokens {path}: a token is there twice, or twice but for upper and lower case",
            "each once",
            "remove one",
        )
    return tuple(tokens)


def render(settings: EdgeSettings) -> dict[str, str]:
    """Return what nginx.conf includes: content by file name."""
    return {
        "settings.conf": _settings_conf(settings),
        "tokens.conf": _tokens_conf(settings.tokens),
        "listen.conf": _listen_conf(settings),
    }


def _settings_conf(settings: EdgeSettings) -> str:
    upstreams = list(settings.upstreams)
    if len(upstreams) > 1:
        upstreams = [upstream.resolved() for upstream in upstreams]
    numbered = list(enumerate(upstreams))
    groups = [
        _group("predictions", upstreams, keep=True),
        # One costs as much as some two hundred predictions.
        _group("explanations", [_explaining(upstream) for upstream in upstreams], keep=True),
        _group("health", upstreams, limited=False),
    ]
    if len(upstreams) > 1:
        groups += [
            _group(f"without_{number}", [other for place, other in numbered if place != number])
            for number, _ in numbered
        ]
    access, errors = (
        ("/dev/stdout", "stderr") if settings.console else ("logs/access.log", "logs/error.log")
    )
    return "\n".join(
        [
            _HEAD,
            *groups,
            _next_map(upstreams),
            f"limit_conn clients {settings.client_connections};",
            f"limit_req_zone $binary_remote_addr zone=rate:10m rate={settings.client_rate}r/s;",
            f"limit_req zone=rate burst={settings.client_rate} nodelay;",
            f"client_max_body_size {settings.max_body}m;",
            f"proxy_read_timeout {settings.timeout}s;",
            f"access_log {access} edge;",
            # Lesser ones quote addresses as they were sent; the access log tells of them.
            f"error_log {errors} crit;",
            f'map $host $edge_model {{\n    default "{settings.model}";\n}}',
            "map $host $edge_too_large {\n    default '"
            '{"error":{"code":"too_large","message":"the body is larger than '
            f"{settings.max_body} MiB; expected less; send fewer images at once\"}}}}';\n}}",
            "",
        ]
    )


def _group(
    name: str, upstreams: Sequence[Upstream], *, keep: bool = False, limited: bool = True
) -> str:
    # Failures do not take a server out of the group: it would be a time-out that did, which may be
    # an image's fault, and a connection that is refused costs less than a millisecond.
    lines = [f"zone {name} 128k;", "least_conn;"]
    for upstream in upstreams:
        limit = f" max_conns={upstream.in_flight}" if limited else ""
        lines.append(f"server {upstream.address} max_fails=0{limit};")
    if keep:
        lines.append("keepalive 64;")
    return "\n    ".join([f"upstream {name} {{", *lines]) + "\n}\n"


def _explaining(upstream: Upstream) -> Upstream:
    return Upstream(upstream.host, upstream.port, max(1, upstream.in_flight // 4))


def _next_map(upstreams: Sequence[Upstream]) -> str:
    """Return what becomes of a request whose first try failed.

    nginx names the group, not a server, where every server was full. Of what was never sent no
    server can have come to harm.
    """
    lines = [
        "default lost;",
        r'"~\|(.*, )?(predictions|explanations)$" busy;',
    ]
    if len(upstreams) > 1:
        for number, upstream in enumerate(upstreams):
            address = re.escape(upstream.address)
            lines.append(rf'"~^(50[37]\|[^|]*|504\|0)\|{address}$" without_{number};')
    lines += [r'"~\|0(, 0)*\|" stopping;', '"~^504" late;', r'"~^[^|]*503\|" stopping;']
    source = '"$upstream_status|$upstream_bytes_sent|$upstream_addr"'
    return "\n    ".join([f"map {source} $edge_next {{", *lines]) + "\n}\n"


def _tokens_conf(tokens: Sequence[str] | None) -> str:
    if tokens is None:
        return f"{_HEAD}default $edge_bearer;\n"
    # No header can hold a line's end, so nothing that is sent equals the default.
    return "\n".join([f'{_HEAD}default "\\n";', *(f'"{token}" "{token}";' for token in tokens), ""])


def _listen_conf(settings: EdgeSettings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if settings.certificate is None or settings.key is None:
        return f"{_HEAD}listen {host}:{settings.port};\n"
    return (
        f"{_HEAD}listen {host}:{settings.port} ssl;\n"
        f"ssl_certificate {_quoted(settings.certificate)};\n"
        f"ssl_certificate_key {_quoted(settings.key)};\n"
    )


def _quoted(path: Path) -> str:
    text = str(path.absolute())
    if not path.is_file() or re.search(r'["\\$\n]', text):
        raise UsageError(
            f'{text} is no file, or its name has one of ", \\ and $',
            "a PEM file",
            "give its path",
        )
    return f'"{text}"'


def _check(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(
            f"{option} {value}", f"a number from {low} to {high}", "choose another value"
        )
