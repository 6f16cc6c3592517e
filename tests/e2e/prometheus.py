"""A real Prometheus beside a server, as Debian packages it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
import yaml

from .servers import ROOT, RunningServer, end_group, wait_for

CONFIG = ROOT / "monitoring" / "prometheus.yml"
SCRAPE_S = 1


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    url: str

    def get(self, path: str, **parameters: object) -> Any:
        """Ask its API."""
        query = urllib.parse.urlencode(parameters)
        address = f"{self.url}/api/v1/{path}?{query}"
        reply = urllib3.request("GET", address, retries=False, timeout=30)
        body = reply.json()
        assert body["status"] == "success", body
        return body["data"]

    def value(self, expr: str) -> float:
        """The one value of a query, now."""
        (series,) = self.get("query", query=expr)["result"]
        return float(series["value"][1])

    def scrapes(self) -> dict[str, str]:
        """The health of each job's target."""
        targets = self.get("targets")["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in targets}


def configured(server: RunningServer, folder: Path) -> Path:
    """The project's own configuration, for this server's ports and a short test."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    ports = {"mambamic": server.port + 3, "torchserve": server.port + 2}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports.pop(job['job_name'])}"]}]
    assert ports == {}
    shutil.copytree(CONFIG.parent / "rules", folder / "rules")
    for rules in (folder / "rules").iterdir():
        text = rules.read_text(encoding="utf-8").replace("interval: 1m", f"interval: {SCRAPE_S}s")
        rules.write_text(text, encoding="utf-8")
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextlib.contextmanager
def prometheus(server: RunningServer, folder: Path) -> Iterator[Prometheus]:
    """Start one that scrapes a server, and end it."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    folder.mkdir()
    command = [
        "prometheus",
        f"--config.file={configured(server, folder)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        running = Prometheus(f"http://127.0.0.1:{port}")

        def scraped() -> bool:
            try:
                return set(running.scrapes().values()) == {"up"}
            except (urllib3.exceptions.HTTPError, json.JSONDecodeError):
                return False

        assert wait_for(scraped, 60), (folder / "log").read_text(encoding="utf-8")
        yield running
    finally:
        end_group(process)
