"""Asking a server: is it up, does it predict, and what did a worker say that died."""

from __future__ import annotations

import http.client
import io
import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mambamic.launcher.folders import ServerFolder

_LINE = re.compile(r"^\S+ \[\w+ *\] (?P<thread>\S+) - (?P<message>.*)$")
DIED = "Backend worker process died."
# A request with this header carries no image: a drawn one is classified. So a readiness check,
# which can send headers but seldom a file, asks for a real prediction, and none that is counted as
# one: probes come day and night, and would drown what the metrics say of the images.
MARK = "x-mambamic-probe"


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    headers: dict[str, str] | None = None,
    host: str = "127.0.0.1",
    timeout: float = 10,
) -> Reply:
    """Send one request, past any proxy.

    Raises:
        OSError: Nobody answers on that port, or not in time.
        http.client.HTTPException: What answers does not speak HTTP.
    """
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return Reply(response.status, response.read())
    finally:
        connection.close()


def reachable(host: str) -> str:
    """Return the address at which a server bound to ``host`` is reached from this machine."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def token(folder: ServerFolder, port: int, kind: str = "inference") -> dict[str, str]:
    """Return the header that admits a request, or none where the server wants no token.

    A new token ends the old one, which clients use; so one is made only where that has expired.

    Args:
        folder: The server's folder.
        port: The port of predictions.
        kind: ``inference`` or ``management``.
    """
    try:
        keys = json.loads(folder.keys.read_text(encoding="utf-8"))
        if _has_expired(keys[kind]["expiration time"]):
            ask(
                port + 1,
                "GET",
                f"/token?type={kind}",
                headers={"Authorization": f"Bearer {keys['API']['key']}"},
            )
            keys = json.loads(folder.keys.read_text(encoding="utf-8"))
        return {"Authorization": f"Bearer {keys[kind]['key']}"}
    except (OSError, ValueError, KeyError):
        return {}


def _has_expired(stated: str) -> bool:
    # Java writes nanoseconds, and fewer digits where the last ones are zero; seconds are enough.
    moment = datetime.strptime(stated[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    return moment <= datetime.now(timezone.utc)


def draw_cell() -> bytes:
    """Return a drawn, not photographed, blood cell as PNG: a probe that needs no file."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (224, 224), (236, 226, 222))
    draw = ImageDraw.Draw(image)
    for box in ((-30, -40, 60, 45), (160, -30, 250, 60), (-50, 150, 40, 240), (170, 165, 260, 255)):
        draw.ellipse(box, fill=(214, 160, 164), outline=(196, 140, 148))
    draw.ellipse((55, 50, 175, 170), fill=(196, 176, 208), outline=(168, 146, 188))
    for box in ((72, 70, 118, 116), (104, 92, 150, 138), (84, 112, 128, 152)):
        draw.ellipse(box, fill=(92, 58, 136))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def worker_failure(logs: Path) -> str | None:
    """Return why a worker died, with its traceback, or None while none has.

    Args:
        logs: The server's log folder.
    """
    said = _messages(logs / "model_log.log")
    for start, (thread, message) in enumerate(said):
        if DIED in message:
            own = [text for name, text in said[start:] if name == thread]
            return "\n".join(_first_traceback(own))
    frontend = _messages(logs / "ts_log.log")
    if any(
        "Backend worker error" in text or "Backend stream closed" in text for _, text in frontend
    ):
        return "\n".join(text for _, text in said[-40:]) or "the worker ended without a word"
    refused = [text for _, text in frontend if "Failed to load model" in text]
    return refused[0] if refused else None


def _messages(log: Path) -> list[tuple[str, str]]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    messages: list[tuple[str, str]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            messages.append((match["thread"], match["message"]))
        elif messages:
            thread, before = messages[-1]
            messages[-1] = (thread, f"{before}\n{line}")
    return messages


def _first_traceback(messages: list[str]) -> list[str]:
    """Cut a worker's last words off where its next life begins."""
    kept = messages[:1]
    for message in messages[1:]:
        if DIED in message or message.startswith(("s_name_part0", "Listening on")):
            break
        kept.append(message)
    return kept
