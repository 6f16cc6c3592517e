"""Draw docs/results.png from ``results/blood_cells.json`` and ``results/benchmark_h200.json``."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from benchmarks.blood_cells import RESULTS
from benchmarks.table import ROOT, TITLES

_COLOURS = {
    "mambamic_t": "#0072B2",
    "mambamic_s": "#009E73",
    "mambamic_b": "#CC79A7",
    "medmamba_t": "#D55E00",
}
_STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


def _curves(axes: Axes, runs: list[dict[str, Any]]) -> None:
    named = set()
    for run in runs:
        arch, curve = run["architecture"], run["curve"]
        label = None if arch in named else TITLES[arch]
        named.add(arch)
        epochs = range(1, len(curve) + 1)
        axes.plot(epochs, curve, color=_COLOURS[arch], linewidth=1.2, alpha=0.8, label=label)
    axes.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0.95, 0.995))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.legend(loc="lower right", frameon=False)


def _trade(axes: Axes, runs: list[dict[str, Any]], speeds: dict[str, float]) -> None:
    beside: Counter[str] = Counter()
    for run in runs:
        arch = run["architecture"]
        measured = run["overall"]["accuracy"]
        value = measured["value"]
        reach = [[value - measured["low"]], [measured["high"] - value]]
        # Runs of one network have one speed: they stand side by side.
        speed = speeds[arch] * (1 + 0.02 * beside[arch])
        beside[arch] += 1
        axes.errorbar(speed, value, reach, fmt="o", color=_COLOURS[arch], capsize=3, markersize=5)
    axes.set(xlabel="images per second, one H200, batch 256", ylabel="test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.yaxis.set_major_locator(MultipleLocator(0.005))
    axes.set_xlim(0, 1.2 * max(speeds[run["architecture"]] for run in runs))


def main() -> None:
    """Draw it."""
    runs = json.loads(RESULTS.read_text())["runs"]
    rows = json.loads((ROOT / "benchmarks/results/benchmark_h200.json").read_text())["rows"]
    speeds: dict[str, float] = {}
    for row in rows:
        if row["part"] == "throughput":
            name = row["architecture"]
            speeds[name] = max(speeds.get(name, 0.0), row["images_per_second"])
    with mpl.rc_context(_STYLE):
        figure = Figure((9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _curves(left, runs)
        _trade(right, [run for run in runs if run["architecture"] in speeds], speeds)
        figure.savefig(ROOT / "docs/results.png", dpi=130)


if __name__ == "__main__":
    main()
