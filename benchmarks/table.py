"""Write the tables of README.md and docs/benchmark.md from what benchmarks left in ``results/``.

``accuracy_test_cpu.json`` comes from ``accuracy.py``, the others from ``mambamic benchmark``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table: benchmarks/table.py -->", "<!-- end of table -->"
_MACHINES = ("benchmark_cpu.json", "benchmark_h200.json")
TITLES = {
    f"{family}_{size}": f"{title}-{size.upper()}"
    for family, title in (("mambamic", "MambaMIC"), ("medmamba", "MedMamba"))
    for size in "tsb"
}
# The largest and the smallest image that is scanned at 224 x 224 pixels.
_SCANS = ([128, 4, 96, 3136], [128, 4, 768, 49])


def _result(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / name).read_text())
    return loaded


def _machine(result: dict[str, Any]) -> str:
    """Return in words where something was measured."""
    device = result["device"]
    if "NVIDIA" in device:
        return f"one {device}"
    return f"two cores of {'an EPYC' if 'EPYC' in device else 'a Xeon'} with AVX-512"


# What the README shows of a GPU; docs/benchmark.md has all of it.
_FIRST = {
    ("mambamic_t", "throughput"),
    ("mambamic_t", "latency"),
    ("mambamic_t", "training"),
    ("mambamic_b", "throughput"),
    ("medmamba_t", "throughput"),
    ("medmamba_t", "latency"),
}


def summary() -> str:
    """Return the README's table in Markdown."""
    accuracy = _result("accuracy_test_cpu.json")
    low, high = (100 * bound for bound in accuracy["interval_95"])
    rows: list[tuple[str, ...]] = [
        (
            f"MambaMIC-T, accuracy on {accuracy['images']:,} held-out blood cells",
            f"{100 * accuracy['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})",
            "",
            f"{_machine(accuracy)}, float32",
            "benchmarks/accuracy.py",
        ),
        *(
            (
                f"the same, mean of {len(mean['seeds'])} such networks",
                f"{100 * mean['accuracy']['value']:.1f} % (95 % interval "
                f"{100 * mean['accuracy']['low']:.1f} to {100 * mean['accuracy']['high']:.1f}), "
                f"AUC {mean['auc']['value']:.4f}, "
                f"calibration error {100 * mean['calibration_error']['value']:.1f} %",
                "",
                f"{_machine(accuracy)}, float32",
                "benchmarks/blood_cells.py",
            )
            for mean in _result("blood_cells.json")["means"]
            if mean["architecture"] == "mambamic_t"
        ),
    ]
    rows += _measured_rows(_FIRST)
    return _markdown(rows)


def details() -> str:
    """Return the table of docs/benchmark.md in Markdown."""
    return _markdown(_measured_rows(None))


def results() -> str:
    """Return the table of docs/results.md in Markdown."""
    campaign = _result("blood_cells.json")
    lines = [
        "| network | seed | epochs (kept) | minutes | validation | test accuracy | AUC | F1 "
        "| calibration error (before) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in campaign["runs"]:
        overall, before = run["overall"], run["calibration_error_before"]["value"]
        lines.append(
            f"| {_network(run)} | {run['seed']} "
            f"| {run['epochs']} ({run['best_epoch']}) | {run['minutes']:.1f} "
            f"| {100 * run['val_accuracy']:.2f} % | {_percent(overall['accuracy'])} "
            f"| {overall['auc']['value']:.5f} | {_percent(overall['f1'])} "
            f"| {_percent(overall['calibration_error'])} ({100 * before:.1f} %) |"
        )
    lines += [
        f"| **{_network(mean)}, mean of {len(mean['seeds'])}** | | | | "
        f"| **{_percent(mean['accuracy'])}** | {mean['auc']['value']:.5f} "
        f"| {100 * mean['f1']['value']:.2f} % "
        f"| {100 * mean['calibration_error']['value']:.2f} % |"
        for mean in campaign["means"]
    ]
    return "\n".join(lines)


def _network(run: dict[str, Any]) -> str:
    title, teachers = TITLES[run["architecture"]], run["teachers"]
    return f"{title}, taught by {teachers}" if teachers else title


def _percent(measured: dict[str, float]) -> str:
    low, high = 100 * measured["low"], 100 * measured["high"]
    return f"{100 * measured['value']:.2f} % ({low:.2f} to {high:.2f})"


def _measured_rows(only: set[tuple[str, str]] | None) -> list[tuple[str, ...]]:
    """Return what ``mambamic benchmark`` measured on each machine."""
    found: list[tuple[str, ...]] = []
    for name in _MACHINES:
        result = _result(name)
        machine, rows = _machine(result), result["rows"]
        if only is not None:
            rows = [row for row in rows if (row.get("architecture"), row["part"]) in only]
        for what, value, published, dtype in _measured(rows):
            found.append((what, value, published, f"{machine}, {dtype}", "mambamic benchmark"))
    return found


def _markdown(rows: list[tuple[str, ...]]) -> str:
    head = "| 224 x 224 pixels | | published code | machine | printed by |"
    lines = [head, "|---|---|---|---|---|"]
    lines += [f"| {what} | {value} | {published} | {where} | `{script}` |"
              for what, value, published, where, script in rows]  # fmt: skip
    return "\n".join(lines)


def _measured(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Yield what was measured, the figure, the published code's, and the dtype."""
    best: dict[str, float] = {}
    for row in rows:
        if row["part"] == "throughput":
            name, rate = row["architecture"], row["images_per_second"]
            best[name] = max(rate, best.get(name, 0))
    for row in rows:
        part, published = row["part"], f"{row['published']:,g}" if "published" in row else ""
        if part == "scan":
            if row["shape"] not in _SCANS:
                continue
            images, _, channels, positions = row["shape"]
            what = f"scan, forward, {images} images, {channels} channels, {positions:,} positions"
            value, unit = f"{_three(row['forward_ms'])} ms", " ms, the scan alone"
        elif part == "latency":
            what = f"{TITLES[row['architecture']]}, one image"
            value = f"{_three(row['p50_ms'])} ms (99 % within {_three(row['p99_ms'])})"
            unit = " ms"
        else:
            rate = row["images_per_second"]
            if part == "throughput" and rate < best[row["architecture"]]:
                continue
            what = f"{TITLES[row['architecture']]}, {'training, ' if part == 'training' else ''}"
            what += f"images per second, batch {row['batch']}"
            value, unit = f"{rate:,.0f}", ""
        yield what, value, published and published + unit, row["dtype"]


def _three(value: float) -> str:
    """Return a number with three significant digits, not in scientific notation."""
    return f"{float(f'{value:.3g}'):g}"


def updated(page: str, table: str) -> str:
    """Return a page with a table in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


# Functions, since a page that is not asked for needs no results.
PAGES = {"README.md": summary, "docs/benchmark.md": details, "docs/results.md": results}


def main() -> None:
    """Rewrite the pages."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, table in PAGES.items():
        page = ROOT / name
        page.write_text(updated(page.read_text(), table()))


if __name__ == "__main__":
    main()
