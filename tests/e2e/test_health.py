"""The probes of a cluster, asked of servers that are well and of one that is not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import urllib3

from mambamic.export.archive import MODEL_CONFIG_FILE, write_archive

from .servers import RunningServer, run_mambamic, serve, wait_for


def ask(server: RunningServer, question: str) -> subprocess.CompletedProcess[str]:
    return run_mambamic(server.state, "health", question, "--port", str(server.port))


@pytest.fixture
def impatient(quick_checkpoint: Path, tmp_path: Path) -> Path:
    """An archive whose workers TorchServe gives up on after two seconds, not five minutes."""
    source = write_archive(quick_checkpoint, tmp_path / "source.mar")
    target = tmp_path / "impatient.mar"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            more = b"maxRetryTimeoutInSec: 2\n" if name == MODEL_CONFIG_FILE else b""
            copy.writestr(name, archive.read(name) + more)
    return target


@pytest.mark.parametrize("options", [(), ("--token-auth",)])
def test_a_server_that_is_well(
    quick_checkpoint: Path, state: Path, options: tuple[str, ...]
) -> None:
    models = ("--model", f"{quick_checkpoint}=other:2")
    with serve(state, str(quick_checkpoint), *models, "--device", "cpu", *options) as server:
        for question, said in (("--ready", "ready"), ("--live", "live")):
            answer = ask(server, question)
            assert (answer.returncode, answer.stderr) == (0, "")
            assert answer.stdout == f"{said}: mambamic/1.0, other/2\n"
        address = f"http://127.0.0.1:{server.port + 3}/metrics"
        told = urllib3.request("GET", address, retries=False, timeout=30).data.decode()
        counts = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[0] != "#")
        probes = [name for name in counts if 'operation="probe"' in name and "requests" in name]
        assert len(probes) == 2
        assert {counts[name] for name in probes} == {"1.0"}
        # Each model was asked for one prediction when it started, and for none since.
        made = [name for name in counts if name.startswith("mambamic_predictions_total")]
        assert sum(float(counts[name]) for name in made) == 2


def test_a_worker_that_is_given_up_on(impatient: Path, state: Path) -> None:
    with serve(state, str(impatient), "--device", "cpu") as server:
        assert ask(server, "--live").returncode == 0
        record = server.folder.read()
        assert record is not None
        (weights,) = Path(record.scratch).glob("models/*/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        (victim,) = server.worker_pids()
        os.kill(victim, signal.SIGKILL)
        assert wait_for(lambda: "TorchServe's health is 500" in ask(server, "--live").stderr, 60)
        # The frontend runs and accepts requests, which then wait for ever.
        java = record.process()
        assert java is not None
        unready = run_mambamic(
            state, "health", "--ready", "--timeout", "2", "--port", str(server.port)
        )
        assert unready.returncode == 1
        assert re.search(r"no answer to POST /predictions/mambamic/1.0 .*timed out", unready.stderr)
        # A stop would wait half a minute for the request that was just sent.
        java.kill()
