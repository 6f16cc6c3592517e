"""A real server against the document of its interface, docs/openapi.yaml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from mambamic.errors import MambamicError

from .servers import ROOT, serve

SEARCH = Path(__file__).with_name("openapi_search.py")
# The variable that tells the search which server to ask.
SERVER = "MAMBAMIC_TESTED_SERVER"


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text("utf-8"))
    return loaded


def test_answers_are_as_documented(quick_checkpoint: Path, state: Path) -> None:
    # Not as one of this run's processes, for which others of its tests would wait.
    apart = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    with serve(state, str(quick_checkpoint), "--device", "cpu", "--decoders", "1") as server:
        # Nor with what the other tests share, which imports torch.
        search = [sys.executable, "-m", "pytest", "--noconftest", "-p", "schemathesis"]
        done = subprocess.run(
            [*search, SEARCH],
            cwd=ROOT,
            env={**apart, SERVER: f"http://127.0.0.1:{server.port}"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_document_is_valid() -> None:
    from openapi_spec_validator import validate

    validate(document())


def test_every_error_code_is_documented() -> None:
    codes = set(document()["components"]["schemas"]["ErrorBody"]["properties"]["code"]["enum"])
    # What no request meets: errors of the command line, of a start and of a client.
    elsewhere = {"error", "bad_shape", "bad_checkpoint", "backend_unavailable", "bad_data"}
    elsewhere |= {"server_failed", "training_failed", "bad_answer", "bad_slide"}
    ours = {kind.code for kind in MambamicError.__subclasses__()} | {"error"}
    assert ours - elsewhere <= codes
    edge = {"unauthorized", "not_found", "method_not_allowed", "rate_limited", "edge_error"}
    edge |= {"worker_lost", "timeout"}
    assert codes - edge == ours - elsewhere - edge
