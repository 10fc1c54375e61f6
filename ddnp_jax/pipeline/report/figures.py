"""The plots of a report, and what all plots share."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddnp_jax import files
from ddnp_jax.pipeline.report.schema import Report

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BLUE, _VERMILION, *_ = COLORS
_LIGHT_BLUE = "#C3DDEE"


def widths_figure(report: Report) -> Figure:
    """The channels of every gate, before and after."""
    before, after = report.widths_before, report.widths
    places = range(len(before))
    figure = Figure(figsize=(max(6.0, 1.2 + 0.27 * len(before)), 4.5), layout="constrained")
    axes = plain_axes(figure)
    axes.bar(places, before, width=0.8, color=_LIGHT_BLUE, label="before")
    axes.bar(places, after, width=0.8, color=_BLUE, label="after")
    for place, width in zip(places, after, strict=True):
        axes.annotate(str(width), (place, width), (0, 1), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(places, report.gate_names, rotation=90 if len(before) > 6 else 0, fontsize=8)
    axes.set_xlim(-0.7, len(before) - 0.3)
    axes.set_ylabel("channels")
    axes.set_title(f"Channels per gate\n{report.title}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def search_figure(report: Report, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy and cost over the search.

    Args:
      report: Result of the run.
      lines: Lines of its search in `metrics.jsonl`.
    """

    def curve(name: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
        points = [(line["step"], scale * line[name]) for line in lines if name in line]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = plain_axes(figure)
    axes.plot(*curve("top1"), color=_BLUE, alpha=0.35, linewidth=1, label="top-1, search images (masks of the search)")
    axes.plot(
        *curve("validation_top1"), color=_BLUE, marker="o", markersize=4, label="top-1, held-out images (cut to p)"
    )
    axes.set_xlabel("search step")
    axes.set_ylabel("top-1 accuracy (%)", color=_BLUE)
    axes.set_title(f"Accuracy and cost over the search\n{report.title}", fontsize=10)
    cost = axes.twinx()
    cost.spines[["top", "left"]].set_visible(False)
    cost.plot(*curve("remaining", 100.0), color=_VERMILION, label="remaining")
    cost.axhline(100.0 * report.p, color=_VERMILION, linestyle="--", linewidth=1, label=f"p = {report.p:g}")
    cost.set_ylim(0, 102)
    cost.set_ylabel(f"{report.budget.unit} (%)", color=_VERMILION)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


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
    axes.grid(axis="y", color="#E5E5E5")
    return axes
