"""How many requests a server is given at a time, so that those which it takes are soon answered."""

from __future__ import annotations

import http.client
from dataclasses import replace

from mambamic.edge.settings import Upstream
from mambamic.errors import UsageError
from mambamic.launcher import probe
from mambamic.launcher.settings import QUEUE_SIZE, Settings

# A processor classifies images one after the other: more at a time gain nothing and wait. Fewer
# would turn requests away that chance brings together, at half of what it can take.
PER_CPU_WORKER = 6


def in_flight(workers: int, batch_size: int, *, gpu: bool) -> int:
    """Return a limit for one model: a GPU classifies a batch while the next one gathers.

    Args:
        workers: Processes of the model.
        batch_size: At most so many requests per batch.
        gpu: Whether they compute on GPUs.
    """
    each = 2 * batch_size if gpu else PER_CPU_WORKER
    return max(1, min(workers * each, QUEUE_SIZE // 2))


def measured(upstream: Upstream) -> Upstream:
    """Return a server with the limit that suits it, as far as its management API tells.

    That API is on loopback: of a server elsewhere the default settings are supposed.
    """
    usual = Settings()
    limit = in_flight(usual.workers, usual.batch_size, gpu=False)
    try:
        if upstream.resolved().host.startswith("127."):
            limit = sum(_of_model(upstream.port + 1, name) for name in _models(upstream.port + 1))
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        UsageError,
        http.client.HTTPException,
    ):
        # Not running, or it wants a token, or its name is known elsewhere only.
        pass
    return replace(upstream, in_flight=max(1, min(limit, QUEUE_SIZE // 2)))


def _models(port: int) -> list[str]:
    listed = probe.ask(port, "GET", "/models?limit=1000", timeout=5).json()
    return [str(model["modelName"]) for model in listed["models"]]


def _of_model(port: int, name: str) -> int:
    path = f"/models/{name}/all"
    return sum(
        in_flight(
            int(version["maxWorkers"]),
            int(version["batchSize"]),
            gpu=any(worker.get("gpu") for worker in version["workers"]),
        )
        for version in probe.ask(port, "GET", path, timeout=10).json()
    )
