"""The rules, by Prometheus' own tool, and the dashboard against the code that generates it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mambamic import metrics

# Grafana's library needs it; on an older Python the committed dashboard is tested as it is.
WITH_LIBRARY = sys.version_info >= (3, 11)
OF_OTHERS = {
    "Requests5XX",
    "ts_inference_requests_total",
    "ts_queue_latency_microseconds",
    "up",
}


@pytest.fixture(scope="module")
def monitoring(root: Path) -> Path:
    return root / "monitoring"


def promtool(*arguments: object) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid(monitoring: Path) -> None:
    promtool("check", "config", monitoring / "prometheus.yml")


def test_the_rules_do_what_they_say(monitoring: Path) -> None:
    tests = sorted((monitoring / "tests").glob("*.yml"))
    assert tests
    promtool("test", "rules", *tests)


def test_every_alert_has_a_test_in_which_it_fires_and_a_place_in_the_documents(
    monitoring: Path, root: Path
) -> None:
    rules = yaml.safe_load((monitoring / "rules" / "alerts.yml").read_text(encoding="utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    tests = yaml.safe_load((monitoring / "tests" / "alerts.yml").read_text(encoding="utf-8"))
    cases = [case for test in tests["tests"] for case in test.get("alert_rule_test", [])]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    document = (root / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert set(re.findall(r"Mambamic[A-Z]\w+", document)) == alerts


@pytest.mark.skipif(not WITH_LIBRARY, reason="grafana-foundation-sdk needs Python 3.11")
def test_the_committed_dashboard_is_what_the_code_generates(
    monitoring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(monitoring))
    dashboard = importlib.import_module("dashboard")
    assert dashboard.OUT.read_text(encoding="utf-8") == dashboard.text()


def test_what_grafana_is_provisioned_with(monitoring: Path) -> None:
    folder = monitoring / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "mambamic.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "mambamic.yml").read_text())["providers"]
    assert (source["type"], source["url"]) == ("prometheus", "${PROMETHEUS_URL}")
    assert provider["options"]["path"] == "${MAMBAMIC_DASHBOARDS}"
    board = json.loads((monitoring / "grafana" / "dashboards" / "mambamic.json").read_text())
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    sources = {target["datasource"]["uid"] for panel in board["panels"]
               for target in panel.get("targets", [])}  # fmt: skip
    assert sources == {"${" + board["templating"]["list"][0]["name"] + "}"}


def asked_for(text: str) -> set[str]:
    """The names of metrics in an expression, but for those of recording rules."""
    bare = re.sub(r'\{[^}]*\}|"[^"]*"|\b(by|on|ignoring|group_left) ?\([^)]*\)|\[[^]]*\]', "", text)
    functions = r"(?!\s*\()"
    words = set(re.findall(rf"(?<![\w:])[A-Za-z]\w*\b(?!:){functions}", bare))
    return words - {
        "and",
        "or",
        "unless",
        "by",
        "offset",
        "group_left",
        "on",
        "ignoring",
        "e6",
        "m",
        "sum",
    }


def test_what_rules_and_panels_ask_for_exists(monitoring: Path) -> None:
    board = json.loads((monitoring / "grafana" / "dashboards" / "mambamic.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    recorded = set()
    for path in sorted((monitoring / "rules").iterdir()):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            asked += [rule["expr"] for rule in group["rules"]]
            recorded |= {rule["record"] for rule in group["rules"] if "record" in rule}
    known = set(OF_OTHERS)
    for metric in metrics.ALL:
        known |= (
            {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
            if metric.kind == "histogram"
            else {metric.sample}
        )
    names = set().union(*map(asked_for, asked))
    assert {name for name in names if name.startswith("mambamic")} >= {
        metrics.REQUEST_DURATION.name + "_bucket",
        metrics.PREDICTIONS.sample,
    }
    assert names <= known
    used = {name for expr in asked for name in re.findall(r"\w+:\w+:\w+", expr)}
    assert used <= recorded
