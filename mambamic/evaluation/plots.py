"""The plots of an evaluation, as PNG: confusion matrix, ROC curves, reliability."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from torchmetrics.functional.classification import binary_roc

from mambamic.evaluation.bins import BINS, curve
from mambamic.evaluation.metrics import confusion_counts
from mambamic.evaluation.predictions import Floats, Predictions

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that paper loses.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--")
_MOST_CURVES = len(_COLOURS) * len(_DASHES)  # with more classes, the lowest alone have colours
_MOST_NUMBERS = 24  # classes of which the confusion matrix has room for numbers
_NAME = 24  # characters of a class name in a plot
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a "$" in a class name is a dollar
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def confusion_plot(predictions: Predictions) -> bytes:
    """Draw how often each class was taken for each, or the four outcomes of each label."""
    with _style():
        counts, rows, columns = _confusion(predictions)
        wide, high = len(columns), len(rows)
        width, height = (0.62 if count <= _MOST_NUMBERS else 0.2 for count in (wide, high))
        figure = Figure((3.2 + width * wide, 2.2 + height * high), layout="constrained")
        axes = figure.subplots()
        shares = _shares(predictions, counts)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(wide), [_short(name) for name in columns], rotation=45, ha="right")
        axes.set_yticks(range(high), [_short(name) for name in rows])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_ylabel("label" if predictions.multi_label else "true class")
        axes.set_xlabel("outcome" if predictions.multi_label else "predicted class")
        if high <= _MOST_NUMBERS:
            _write_numbers(axes, counts, shares)
        bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1), shrink=0.8)
        bar.set_label("share of those that carry it, or not" if predictions.multi_label
                      else "share of the true class")  # fmt: skip
        bar.outline.set_visible(False)
        return _png(figure)


def roc_plot(predictions: Predictions, auc: Floats) -> bytes:
    """Draw the ROC curve of each class against the rest.

    Args:
        predictions: What is drawn.
        auc: (K,), nan for a class without a curve.
    """
    with _style():
        drawn = [place for place in np.argsort(auc, kind="stable") if not np.isnan(auc[place])]
        shown = drawn if len(drawn) <= _MOST_CURVES else drawn[: len(_COLOURS)]
        colours = sorted(shown)
        # Curves that all hug the corner are told apart by looking at the corner.
        corner = bool(drawn) and auc[drawn].min() > 0.95
        figure = Figure((11 if corner else 7.5, 5), layout="constrained")
        panels = figure.subplots(1, 2 if corner else 1, squeeze=False)[0]
        for place in drawn:
            target = torch.from_numpy(predictions.truth[:, place]).long()
            scores = torch.from_numpy(predictions.probabilities[:, place])
            false, true, _ = (values.numpy() for values in binary_roc(scores, target))
            look: dict[str, Any] = {"color": "#BBBBBB", "lw": 0.8}
            if place in shown:
                name = f"{_short(predictions.classes[place])}  {auc[place]:.5f}"
                look = {"label": name, "lw": 1.8, "zorder": 3, **_look(colours.index(place))}
            for axes in panels:
                axes.plot(false, true, **look)
        for axes in panels:
            axes.plot((0, 1), (0, 1), color="#999999", lw=0.8)
            axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.005))
        if corner:
            panels[1].set(xlim=(0, 0.1), ylim=(0.9, 1.0005), title="the same, the corner")
        if drawn:
            title = "class  AUC" if len(shown) == len(drawn) else f"the lowest {len(shown)}  AUC"
            handles, names = panels[0].get_legend_handles_labels()
            figure.legend(handles, names, title=title, loc="outside right center", frameon=False)
        return _png(figure)


def reliability_plot(series: Sequence[tuple[str, Predictions]]) -> bytes:
    """Draw the share that came true against the probability, with the number of images below.

    Args:
        series: What to call them, and predictions; one, or those before and after calibration.
    """
    with _style():
        figure = Figure((6, 6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot((0, 1), (0, 1), color="#999999", lw=0.8)
        edges = np.linspace(0, 1, BINS + 1)
        for place, (name, predictions) in enumerate(series):
            mean, share, count = curve(predictions)
            full = count > 0
            look = _look(place)
            # The area of a mark is as the number of images: single ones are not to mislead.
            sizes = 6 + 120 * count[full] / count.max()
            upper.plot(mean[full], share[full], lw=1, alpha=0.6, **look)
            upper.scatter(mean[full], share[full], sizes, color=look["color"], label=name,
                          marker="os"[place % 2], zorder=3, clip_on=False)  # fmt: skip
            lower.stairs(count, edges, lw=1.8, color=look["color"], ls=look["ls"])
        several = series[0][1].multi_label
        upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is so" if several
                  else "share that is right")  # fmt: skip
        lower.set(xlabel="probability of the label" if several else "probability of the top class",
                  ylabel="labels" if several else "images", yscale="log")  # fmt: skip
        lower.set_ylim(bottom=0.7)
        lower.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        lower.minorticks_off()
        if len(series) > 1:
            upper.legend(frameon=False, loc="upper left")
        return _png(figure)


def _confusion(predictions: Predictions) -> tuple[Floats, Sequence[str], Sequence[str]]:
    counts = np.asarray(confusion_counts(predictions), float)
    if not predictions.multi_label:
        return counts, predictions.classes, predictions.classes
    columns = ("there, found", "there, missed", "absent, found", "absent, not found")
    return counts, predictions.classes, columns


def _shares(predictions: Predictions, counts: Floats) -> Floats:
    if predictions.multi_label:
        pairs = counts.reshape(-1, 2, 2)
        return np.asarray(pairs / np.maximum(pairs.sum(2, keepdims=True), 1)).reshape(-1, 4)
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _write_numbers(axes: Axes, counts: Floats, shares: Floats) -> None:
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = shares[row, column] > 0.5
            axes.text(column, row, f"{count:.0f}", ha="center", va="center",
                      color="white" if dark else "black", fontsize=9)  # fmt: skip


def _look(place: int) -> dict[str, str]:
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "ls": _DASHES[place // len(_COLOURS) % len(_DASHES)],
    }


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Class names in scripts that the font lacks are drawn as boxes; the page shows them right.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
