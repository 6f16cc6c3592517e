"""Draw the dashboard from what a Prometheus has recorded: every panel, by its own queries.

    python monitoring/render.py http://127.0.0.1:9090 docs/dashboard.png --minutes 5

For documents and reports, where no Grafana is at hand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from numpy.typing import NDArray

BOARD = Path(__file__).parent / "grafana" / "dashboards" / "mambamic.json"
COLUMNS = 24  # of Grafana's grid
CELL = (0.75, 0.37)  # of that grid, in inches
UNITS = {"s": "seconds", "reqps": "per second", "percentunit": "share", "bytes": "GB", "short": ""}
SCALES = {"bytes": 1e-9}


@dataclass(frozen=True)
class Span:
    """The time that is drawn: seconds since 1970, and between two points."""

    start: float
    end: float
    step: float


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what asks for data, in the order of the dashboard."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expression(target: dict[str, Any], window_s: int) -> str:
    """Return a query as Grafana would send it.

    Args:
        target: Of a panel.
        window_s: What Grafana derives from the interval of scrapes: four of them.
    """
    stated: str = target["expr"]
    return stated.replace("$__rate_interval", f"{window_s}s").replace("$model", ".*")


def ask(url: str, path: str, **parameters: object) -> list[dict[str, Any]]:
    """Return the series that Prometheus answers with."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=30) as reply:
        series: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return series


def answer(url: str, target: dict[str, Any], span: Span, window_s: int) -> list[dict[str, Any]]:
    """Return the series of one query of a panel."""
    expr = expression(target, window_s)
    if target.get("instant"):
        return ask(url, "query", query=expr, time=span.end)
    return ask(url, "query_range", query=expr, start=span.start, end=span.end, step=span.step)


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """Return the name of a line."""
    stated: str = target["legendFormat"]
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), stated).strip()


def points(series: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return times, in days as matplotlib counts, and values, (N,) each."""
    rows = np.array(series["values"], dtype=np.float64)
    return rows[:, 0] / 86400, rows[:, 1]


def draw(url: str, board: dict[str, Any], span: Span, window_s: int) -> Figure:
    """Draw all panels where Grafana would put them."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(COLUMNS * CELL[0], bottom * CELL[1]), dpi=80)
    for panel in board["panels"]:
        left, top, width, height = (panel["gridPos"][key] for key in "xywh")
        if panel["type"] == "row":
            figure.text(0.005, 1 - (top + 0.7) / bottom, panel["title"], fontsize=13)
            continue
        # The margins hold the title, and what is written at the axes.
        axes = figure.add_axes(
            (
                (left + 0.9) / COLUMNS,
                1 - (top + height - 1.0) / bottom,
                (width - 1.2) / COLUMNS,
                (height - 2.0) / bottom,
            )
        )
        axes.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
        answers = [(target, answer(url, target, span, window_s)) for target in panel["targets"]]
        {"timeseries": draw_lines, "heatmap": draw_heat, "table": draw_table}[panel["type"]](
            axes, panel, answers
        )
    return figure


Answers = Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]


def draw_lines(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    """Draw lines, or areas upon each other."""
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults.get("unit", "")
    stacked = "stacking" in defaults["custom"]
    floor: NDArray[np.float64] | float = 0.0
    for target, found in answers:
        for series in found:
            times, values = points(series)
            values = np.nan_to_num(values, nan=0.0 if stacked else math.nan)
            values = values * SCALES.get(unit, 1)
            name = legend(target, series["metric"])
            if stacked:
                axes.fill_between(times, floor, floor + values, label=name, alpha=0.7)
                floor = floor + values
            else:
                axes.plot(times, values, label=name, linewidth=1.3)
    # A line at 0 is to be seen.
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    axes.set_ylabel(UNITS[unit], fontsize=8)
    axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper left")
    axes.grid(alpha=0.3)
    time_axis(axes)


def draw_heat(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    """Draw how many observations fell between two bounds, over time."""
    del panel
    ((_, found),) = answers
    ordered = sorted(found, key=lambda series: float(series["metric"]["le"]))
    times = points(ordered[0])[0]
    counts = np.diff([points(series)[1] for series in ordered], axis=0, prepend=0)
    bounds = [series["metric"]["le"].removesuffix(".0") for series in ordered]
    used = int(np.nonzero(counts.max(1) > 0)[0].max()) + 1
    mesh = axes.pcolormesh(times, np.arange(used), counts[:used], cmap="viridis")
    axes.set_yticks(np.arange(used), [f"≤ {bound}" for bound in bounds[:used]], fontsize=7)
    axes.figure.colorbar(mesh, ax=axes, label="batches", pad=0.01)
    time_axis(axes)


def draw_table(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    """Write the labels of the first series, one on a line."""
    del panel
    axes.axis("off")
    for _, found in answers:
        labels = {key: value for key, value in found[0]["metric"].items() if key[0] != "_"}
        rows = [[key, value] for key, value in sorted(labels.items())]
        axes.table(rows, loc="center", cellLoc="left", colWidths=[0.25, 0.7], edges="horizontal")


def time_axis(axes: Axes) -> None:
    """Label the horizontal axis with times."""
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.tick_params(labelsize=7)


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="of Prometheus")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--minutes", type=float, default=60, help="to look back")
    parser.add_argument("--scrape", type=int, default=15, help="seconds between two scrapes")
    args = parser.parse_args()
    now = time.time()
    span = Span(now - 60 * args.minutes, now, max(args.scrape, 60 * args.minutes / 200))
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        draw(args.url, board, span, 4 * args.scrape).savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
