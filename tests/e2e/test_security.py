"""What SECURITY.md says of a server that runs, asked of one."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import urllib3
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mambamic.export.archive import write_archive

from .servers import RunningServer, serve

SECRET = "patient-4711"


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port, and what was sent to it."""
    heard: list[bytes] = []

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    heard.append(connection.recv(1000))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield server.getsockname()[1], heard
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def ask(port: int, method: str, path: str) -> int:
    address = f"http://127.0.0.1:{port}{path}"
    return urllib3.request(method, address, retries=False, timeout=30).status


def listening(server: RunningServer) -> set[tuple[str, int]]:
    record = server.folder.read()
    assert record is not None
    java = record.process()
    assert java is not None
    return {
        (one.laddr.ip.removeprefix("::ffff:").replace("::", "0.0.0.0"), one.laddr.port)
        for process in (java, *java.children(recursive=True))
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }


def test_no_model_comes_by_a_url(
    server: RunningServer,
    listener: tuple[int, list[bytes]],
    quick_checkpoint: Path,
    tmp_path: Path,
    cell: bytes,
) -> None:
    port, heard = listener
    elsewhere = write_archive(quick_checkpoint, tmp_path / "other.mar")
    for address in (
        f"http://127.0.0.1:{port}/other.mar",
        f"http://127.0.0.1:{port}/{quote('../')}other.mar",
        f"file://{elsewhere}",
        f"file://{server.folder.store}/../../{elsewhere.name}",
        str(elsewhere),
    ):
        for path in (f"/models?url={quote(address, safe='')}", f"/workflows?url={address}"):
            assert ask(server.port + 1, "POST", path) >= 400, path
            assert ask(server.port, "POST", path) >= 400, path
    assert heard == []
    assert ask(server.port + 1, "DELETE", f"/models/{server.model}") >= 400
    assert server.body(cell).status == 200
    assert (server.folder.root / "config.properties").read_text("utf-8").count("allowed_urls=") == 1


def test_the_listener_hears_what_is_sent(listener: tuple[int, list[bytes]]) -> None:
    port, heard = listener
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"hello")
        connection.recv(1)
    assert heard == [b"hello"]


def test_management_is_not_on_the_port_of_predictions(server: RunningServer) -> None:
    for method, path in (
        ("GET", "/models"),
        ("GET", f"/models/{server.model}"),
        ("PUT", f"/models/{server.model}?min_worker=0"),
        ("DELETE", f"/models/{server.model}"),
        ("GET", "/metrics"),
        ("GET", "/token?type=inference"),
    ):
        assert ask(server.port, method, path) >= 400, (method, path)
    assert len(server.worker_pids()) == 1


def test_only_predictions_leave_loopback(
    server: RunningServer, quick_checkpoint: Path, state: Path
) -> None:
    where = [(server, "127.0.0.1", listening(server))]
    anywhere = ("--device", "cpu", "--host", "0.0.0.0")
    with serve(state, str(quick_checkpoint), *anywhere) as open_to_all:
        where.append((open_to_all, "0.0.0.0", listening(open_to_all)))
    for one, host, found in where:
        ports = {port: address for address, port in found}
        assert ports.pop(one.port) == host
        assert {one.port + 1, one.port + 2} <= set(ports)
        assert set(ports.values()) == {"127.0.0.1"}


def test_logs_hold_nothing_of_an_image(server: RunningServer, cell: bytes) -> None:
    image = Image.open(io.BytesIO(cell))
    text, exif = PngInfo(), Image.Exif()
    text.add_text("Comment", SECRET)
    text.add_itxt("XML:com.adobe.xmp", f"<x>{SECRET}</x>")
    exif[0x010E] = SECRET
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text, exif=exif)
    data = buffer.getvalue()
    assert data.count(SECRET.encode()) >= 3
    name = f"{SECRET}.png"
    address = f"http://127.0.0.1:{server.port}/%s/{server.model}?case={SECRET}"
    broken = (data[:-300], data.replace(b"IDAT", b"IDAX"))
    for path, contents in (("predictions", (data, *broken)), ("explanations", broken)):
        for content in contents:
            for fields in (
                {"image": (name, content, "image/png")},
                {SECRET: (name, content, "image/png"), "b": (name, b"", "image/png")},
            ):
                urllib3.request("POST", address % path, fields=fields, retries=False, timeout=60)
    headers = {"X-File": SECRET, "Referer": f"http://x/{SECRET}", "User-Agent": SECRET}
    assert server.body(data, headers=headers).status == 200
    written = [path for path in server.logs.iterdir() if path.is_file()]
    assert any(path.name == "access_log.log" and path.stat().st_size for path in written)
    for log in written:
        assert SECRET not in log.read_text(encoding="utf-8", errors="replace"), log.name
