"""The plots of a report, and what all plots share."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddnp_jax import files
from ddnp_jax.pipeline.report.schema import Report

# Okabe and Ito's colors, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TEXT, GRID = "#000000", "#E5E5E5"
BLUE, _VERMILION, _, _, _, SKY_BLUE, _ = COLORS
LIGHT_BLUE = "#C3DDEE"


def widths_figure(report: Report) -> Figure:
    """The channels of every gate, before and after."""
    before, after = report.widths_before, report.widths
    places = range(len(before))
    figure = Figure(figsize=(max(6.0, 1.2 + 0.27 * len(before)), 4.5), layout="constrained")
    axes = plain_axes(figure)
    axes.bar(places, before, width=0.8, color=LIGHT_BLUE, label="before")
    axes.bar(places, after, width=0.8, color=BLUE, label="after")
    for place, width in zip(places, after, strict=True):
        axes.annotate(str(width), (place, width), (0, 1), textcoords="offset points", ha="center", fontsize=7)
    names = [literal(name) for name in report.gate_names]
    axes.set_xticks(places, names, rotation=90 if len(before) > 6 else 0, fontsize=8)
    axes.set_xlim(-0.7, len(before) - 0.3)
    axes.set_ylabel("channels")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def search_figure(report: Report, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over the search, and below it the part of the cost that remains.

    Args:
      report: Result of the run.
      lines: Lines of its search in `metrics.jsonl`.
    """

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(line["step"], line[name]) for line in lines if name in line]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    accuracy, cost = (plain_axes(figure, rows=2, place=place) for place in range(2))
    cost.sharex(accuracy)
    accuracy.plot(*curve("top1"), color=BLUE, alpha=0.55, linewidth=1, label="search images (masks of the search)")
    accuracy.plot(*curve("validation_top1"), color=BLUE, marker="o", markersize=4, label="held-out images (cut to p)")
    accuracy.tick_params(labelbottom=False)
    accuracy.set_ylabel("top-1 accuracy (%)")
    cost.plot(*curve("remaining"), color=_VERMILION, label=literal(f"part of the {report.budget.unit} that remains"))
    cost.axhline(report.p, color=TEXT, linestyle="--", linewidth=1, zorder=1.9, label=f"target, p = {report.p:g}")
    cost.set_ylim(0, 1.02)
    cost.set_ylabel("remaining cost")
    cost.set_xlabel("search step")
    for axes in (accuracy, cost):
        # Above the axes, where it covers no curve.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.2, fontsize=9)
    figure.align_ylabels()
    return figure


def titled(figure: Figure, what: str, report: Report) -> Figure:
    """The figure with what it shows and the name of the run above it, for where it stands alone."""
    figure.suptitle(literal(f"{what}\n{report.title}"), fontsize=10)
    return figure


def literal(text: str) -> str:
    """A text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def write_figure(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    files.write_bytes(path, content.getvalue())


def plain_axes(figure: Figure, rows: int = 1, columns: int = 1, place: int = 0) -> Axes:
    """Axes without box at one of rows * columns places, counted along the rows from 0."""
    axes = figure.add_subplot(rows, columns, place + 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    return axes
