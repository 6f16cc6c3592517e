"""Generate the Grafana dashboard; the JSON is committed, and a test holds it against this.

Run it after a change: python monitoring/dashboard.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, table
from grafana_foundation_sdk.builders import timeseries as lines
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from mambamic import metrics

OUT = Path(__file__).parent / "grafana" / "dashboards" / "mambamic.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
MODEL = 'model=~"$model"'
PREDICT = f'{MODEL},operation="predict"'
WINDOW = "[$__rate_interval]"
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of its lines."""

    expr: str
    legend: str


def quantiles(metric: metrics.Metric, labels: str = MODEL) -> list[Query]:
    """Return the queries for the percentiles of a histogram."""
    rates = f"sum by (le) (rate({metric.name}_bucket{{{labels}}}{WINDOW}))"
    return [Query(f"histogram_quantile({q}, {rates})", f"p{100 * q:.0f}") for q in QUANTILES]


def mean(metric: metrics.Metric, legend: str) -> Query:
    """Return the query for the mean of a histogram's observations."""
    total, count = (
        f"sum(rate({metric.name}_{part}{{{MODEL}}}{WINDOW}))" for part in ("sum", "count")
    )
    return Query(f"{total} / {count}", legend)


def rate(metric: metrics.Metric, by: str, labels: str = MODEL) -> str:
    """Return the expression for the rate of a counter, per value of a label."""
    return f"sum by ({by}) (rate({metric.sample}{{{labels}}}{WINDOW}))"


def panel(
    title: str, description: str, unit: str, queries: Sequence[Query], width: int = 8
) -> lines.Panel:
    """Return a panel of lines."""
    built = (
        lines.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(width)
        .height(8)
        .fill_opacity(8)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    for number, query in enumerate(queries):
        built.with_target(target(query, number))
    return built


def target(query: Query, number: int = 0) -> prometheus.Dataquery:
    """Return one query of a panel."""
    return (
        prometheus.Dataquery()
        .datasource(SOURCE)
        .ref_id(chr(ord("A") + number))
        .expr(query.expr)
        .legend_format(query.legend)
        .range()
    )


def traffic() -> list[Any]:
    """Requests, what they cost, and what went wrong."""
    errors = Query(rate(metrics.ERRORS, "reason"), "{{reason}}")
    frontend = Query(
        f"sum(rate(Requests5XX{WINDOW})) or vector(0)", "5xx of TorchServe, ours included"
    )
    return [
        panel(
            "Requests",
            "Answered requests, by HTTP status",
            "reqps",
            [Query(rate(metrics.ANSWERS, "status", PREDICT), "{{status}}")],
        ),
        panel(
            "Errors by reason",
            "Error objects in answers; below them what TorchServe answered without a worker",
            "reqps",
            [errors, frontend],
        ),
        panel(
            "Images in flight",
            "Read by workers and not yet answered, at the moment of the scrape",
            "short",
            [Query(f"sum({metrics.IN_FLIGHT.name}{{{MODEL}}})", "images")],
        ),
    ]


def latency() -> list[Any]:
    """Where the time goes."""
    torchserve = (
        f"sum(rate(ts_queue_latency_microseconds{WINDOW}))"
        f" / sum(rate(ts_inference_requests_total{WINDOW})) / 1e6"
    )
    phases = [
        ("End to end", metrics.REQUEST_DURATION, PREDICT),
        ("Queue wait", metrics.QUEUE_WAIT, MODEL),
        ("Whole handler", metrics.HANDLER_DURATION, PREDICT),
        ("Decode", metrics.DECODE_DURATION, MODEL),
        ("Preprocess", metrics.PREPROCESS_DURATION, MODEL),
        ("Model", metrics.MODEL_DURATION, MODEL),
    ]
    return [
        *(
            panel(title, metric.help, "s", quantiles(metric, labels))
            for title, metric, labels in phases
        ),
        panel(
            "Queue against model",
            "Means: waiting since the edge, waiting in TorchServe's queue, one pass of the model",
            "s",
            [
                mean(metrics.QUEUE_WAIT, "since the edge"),
                Query(torchserve, "TorchServe's queue"),
                mean(metrics.MODEL_DURATION, "model"),
            ],
            12,
        ),
        batch_sizes(),
    ]


def batch_sizes() -> heatmap.Panel:
    """How many requests go to a worker together, over time."""
    counts = f"sum by (le) (increase({metrics.BATCH_REQUESTS.name}_bucket{{{MODEL}}}{WINDOW}))"
    return (
        heatmap.Panel()
        .title("Batch size")
        .description(metrics.BATCH_REQUESTS.help)
        .datasource(SOURCE)
        .span(12)
        .height(8)
        .with_target(target(Query(counts, "{{le}}")).format(PromQueryFormat.HEATMAP))
    )


def predictions() -> list[Any]:
    """What the model says, and whether that changes."""
    classes = rate(metrics.PREDICTIONS, "class")
    share = f"{classes} / ignoring(class) group_left sum(rate({metrics.PREDICTIONS.sample}"
    mix = Query(f"{share}{{{MODEL}}}{WINDOW}))", "{{class}}")
    foreign = (
        f"sum(rate({metrics.OUT_OF_DISTRIBUTION.sample}{{{MODEL}}}{WINDOW}))"
        f" / sum(rate({metrics.PREDICTIONS.sample}{{{MODEL}}}{WINDOW}))"
    )
    stacked = common.StackingConfig().mode(StackingMode.NORMAL).group("A")
    return [
        panel("Class mix", "Share of each predicted class", "percentunit", [mix], 12)
        .stacking(stacked)
        .fill_opacity(60)
        .max(1),
        panel(
            "Confidence",
            metrics.CONFIDENCE.help,
            "percentunit",
            [*quantiles(metrics.CONFIDENCE)[:2], mean(metrics.CONFIDENCE, "mean")],
            12,
        ).max(1),
        panel(
            "Images of another kind",
            "Share of the predictions; nothing where the checkpoint has no detector",
            "percentunit",
            [Query(foreign, "out of distribution")],
        ),
        panel(
            "Drift",
            "Last hour against last seven days: distance of the class mixes, and of the mean "
            "confidences",
            "percentunit",
            [
                Query(f"model:mambamic_class_mix:distance1h_7d{{{MODEL}}}", "class mix {{model}}"),
                Query(
                    f"abs(model:mambamic_prediction_confidence:mean1h{{{MODEL}}}"
                    f" - model:mambamic_prediction_confidence:mean7d{{{MODEL}}})",
                    "confidence {{model}}",
                ),
            ],
        ),
        panel(
            "Worker starts",
            "In 15 minutes; more than one for each worker means that workers die",
            "short",
            [
                Query(
                    f"sum by (model) (increase({metrics.WORKER_STARTS.sample}{{{MODEL}}}[15m]))",
                    "{{model}}",
                )
            ],
        ),
    ]


def machine() -> list[Any]:
    """The GPU, and what is in use."""
    memory = [
        (metrics.GPU_ALLOCATED, "tensors"),
        (metrics.GPU_RESERVED, "held by workers"),
        (metrics.GPU_USED, "in use"),
        (metrics.GPU_TOTAL, "there is"),
    ]
    return [
        panel(
            "GPU memory",
            "0 where there is no GPU",
            "bytes",
            [
                Query(f"sum by (device) ({metric.name}) or vector(0)", f"{what} {{{{device}}}}")
                for metric, what in memory
            ],
            12,
        ),
        (
            table.Panel()
            .title("In use")
            .description("Models, devices, kernels and versions")
            .datasource(SOURCE)
            .span(12)
            .height(8)
            .with_target(
                target(Query(f"{metrics.INFO.name}{{{MODEL}}}", ""))
                .instant()
                .format(PromQueryFormat.TABLE)
            )
        ),
    ]


def build() -> dashboard.Dashboard:
    """Return the whole dashboard."""
    models = (
        dashboard.QueryVariable("model")
        .label("Model")
        .datasource(SOURCE)
        .query(f"label_values({metrics.INFO.name}, model)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
    )
    board = (
        dashboard.Dashboard("mambamic")
        .uid("mambamic")
        .description("A mambamic server: docs/metrics.md says what is counted")
        .tags(["mambamic"])
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(models)
    )
    rows: list[tuple[str, Callable[[], list[Any]]]] = [
        ("Traffic", traffic),
        ("Latency", latency),
        ("Predictions", predictions),
        ("Machine", machine),
    ]
    numbers = itertools.count(1)
    for title, panels in rows:
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for one in panels():
            board.with_panel(one.id(next(numbers)))
    return board


def text() -> str:
    """Return the dashboard as Grafana reads it."""
    encoded: str = JSONEncoder(sort_keys=True, indent=2).encode(build().build())
    return encoded + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
    print(OUT)
