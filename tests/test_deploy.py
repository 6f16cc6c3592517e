"""Compose file and cluster manifests: their schemas, and whether they fit the program."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mambamic import __version__
from mambamic.cli import COMMANDS, _parse
from mambamic.handlers.service import DEFAULT_RESPONSE_TIMEOUT
from mambamic.launcher.settings import Settings

from .e2e.servers import ROOT, free_port, wait_for

KUBERNETES = ROOT / "deploy" / "kubernetes"
KINDS = {
    "Namespace",
    "Deployment",
    "Service",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "NetworkPolicy",
}


def manifests() -> list[dict[str, Any]]:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))["resources"]
    assert set(listed) == {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    return [
        document
        for name in listed
        for document in yaml.safe_load_all((KUBERNETES / name).read_text("utf-8"))
    ]


def pod() -> dict[str, Any]:
    (deployment,) = [one for one in manifests() if one["kind"] == "Deployment"]
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    return found


def test_manifests_are_valid() -> None:
    assert {manifest["kind"] for manifest in manifests()} == KINDS
    for manifest in manifests():
        kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_the_compose_file_is_valid() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_what_is_called_exists() -> None:
    containers = [*pod()["containers"], *pod()["initContainers"]]
    called = [one["args"] for one in containers if one["image"] == "mambamic"]
    ours = [one for one in services().values() if "mambamic:" in one["image"]]
    called += [one["command"] for one in ours if "entrypoint" not in one]
    for container in containers:
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(name, {}).get("exec")
            if probe is not None:
                program, *words = probe["command"]
                assert program == "mambamic"
                called.append(words)
    assert {words[0] for words in called} == {"serve", "edge", "health"}
    for words in called:
        # Values that the environment sets have their defaults.
        plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]
        if words[0] in COMMANDS:
            _parse(plain)


def test_probes_are_as_patient_as_the_server_is_slow() -> None:
    (server,) = [one for one in pod()["containers"] if one["name"] == "server"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        args = _parse(server[name]["exec"]["command"][1:])
        # The command says what was wrong; one that is cut off says nothing.
        assert args.timeout < server[name]["timeoutSeconds"]
        if name == "readinessProbe":
            # Until then a batch may begin another explanation.
            assert args.timeout > DEFAULT_RESPONSE_TIMEOUT / 2


def test_the_server_outlasts_the_edge() -> None:
    sleeps = {}
    for one in pod()["containers"]:
        if "lifecycle" in one:
            _, seconds = one["lifecycle"]["preStop"]["exec"]["command"]
            sleeps[one["name"]] = int(seconds)
    assert sleeps["server"] > sleeps["edge"]
    (server,) = [one for one in pod()["containers"] if one["name"] == "server"]
    drained = sleeps["server"] + _parse(server["args"]).drain + 15
    assert pod()["terminationGracePeriodSeconds"] > drained


def test_nothing_but_the_edge_can_be_reached() -> None:
    (server,) = [one for one in pod()["containers"] if one["name"] == "server"]
    for words in (server["args"], services()["server"]["command"]):
        assert _parse(words).host == "127.0.0.1"
    ports = {port["containerPort"] for one in pod()["containers"] for port in one.get("ports", ())}
    assert ports == {8000, 9100}
    (policy,) = [one["spec"] for one in manifests() if one["kind"] == "NetworkPolicy"]
    assert policy["egress"] == []
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports
    shared = [one for name, one in services().items() if name not in ("network", "edge-files")]
    assert all(one["network_mode"] == "service:network" and "ports" not in one for one in shared)
    published, grafana = services()["network"]["ports"]
    assert published.endswith(":8000")
    assert grafana.startswith("127.0.0.1:")


def test_a_full_pod_waits_longer_than_the_autoscaler_wants() -> None:
    (scaler,) = [one for one in manifests() if one["kind"] == "HorizontalPodAutoscaler"]
    (metric,) = scaler["spec"]["metrics"]
    target = metric["pods"]["target"]["averageValue"]
    assert target.endswith("m")
    # Measured with what the edge admits; the autoscaler adds pods from 1.1 times its target on.
    full_s = 0.09
    assert float(target[:-1]) / 1000 < full_s / 2
    (edge,) = pod()["initContainers"]
    assert "--in-flight=6" in edge["args"]


def test_no_service_loses_its_network_when_another_is_started_again() -> None:
    network = services()["network"]
    # It does nothing that could end; where it is made anew, so are those that live in it.
    assert network["entrypoint"] == ["sleep", "infinity"]
    for name in ("server", "edge", "prometheus", "grafana"):
        assert services()[name]["depends_on"]["network"]["restart"]


def test_every_container_is_without_rights() -> None:
    for container in [*pod()["containers"], *pod()["initContainers"]]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
    assert pod()["securityContext"]["runAsNonRoot"]
    for service in services().values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]


def test_one_version_and_pinned_images() -> None:
    (image,) = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))["images"]
    assert image["newTag"] == __version__
    named = {one["image"] for one in pod()["containers"]} - {"mambamic"}
    named |= {one["image"] for one in services().values()}
    assert f"mambamic:${{MAMBAMIC_TAG:-{__version__}}}" in named
    for name in named:
        assert re.search(r":v?\d", name) or "MAMBAMIC_TAG" in name, name


@pytest.fixture
def metrics() -> Iterator[int]:
    """A server that says which path it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            _, port = self.connection.getsockname()
            self.wfile.write(f"{port} {self.path}".encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def fetch(address: str, method: str = "GET") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method)) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""
    except urllib.error.URLError:
        return 0, ""


def test_the_gate_gives_metrics_and_nothing_else(metrics: int) -> None:
    settings = Settings()
    text = (KUBERNETES / "metrics-gate.conf").read_text("utf-8")
    # The ports of this test for those of a pod.
    assert f":{settings.metrics_port}/" in text
    port = free_port()
    text = text.replace("listen 9100", f"listen 127.0.0.1:{port}")
    text = re.sub(r"127\.0\.0\.1:808\d/", f"127.0.0.1:{metrics}/", text)
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(folder, "gate.conf")
        conf.write_text(text.replace("/tmp/", f"{folder}/"), encoding="utf-8")
        command = ["nginx", "-e", "stderr", "-c", str(conf), "-g", "daemon off;"]
        with subprocess.Popen(command) as nginx:
            try:
                address = f"http://127.0.0.1:{port}"
                assert wait_for(lambda: fetch(f"{address}/metrics")[0] != 0, 10)
                assert fetch(f"{address}/metrics") == (200, f"{metrics} /metrics")
                assert fetch(f"{address}/torchserve") == (200, f"{metrics} /metrics")
                assert fetch(f"{address}/models") == (404, "")
                assert fetch(f"{address}/predictions/mambamic", "POST") == (404, "")
                assert fetch(f"{address}/metrics", "POST") == (403, "")
            finally:
                nginx.terminate()
