"""Plots of accuracy against cost, over several methods."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddnp_jax.pipeline.report import figures
from ddnp_jax.pipeline.report.schema import Report
from ddnp_jax.pipeline.report.tables import CONTROL

LEGEND = (
    "A point is the mean over seeds, with error bars of one sample standard deviation. The line is the Pareto front, "
    "the networks that no other matches in accuracy at the same or a lower cost. Latency is relative to the base's, "
    "measured interleaved with it: milliseconds of different runs depend on other load on the machine."
)
_COLORS, _MARKERS = figures.COLORS[:-1], "os^DvPX"  # 6 and 7: no two of 42 methods look the same; black is the base's
_LEGEND_INCHES = (0.65, 0.072)  # width of a column of the legend: of its marker, and of each letter

Style = tuple[str, str]  # color and marker


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
      caption: What it shows.
      figure: The plot itself.
    """

    caption: str
    figure: Figure


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A color and a marker for every method, by its name."""
    pairs = zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=True)
    return dict(zip(dict.fromkeys(methods), pairs, strict=False))


def plots(lines: Sequence[Sequence[Report]], styles: Mapping[str, Style]) -> Iterator[Plot]:
    """Accuracy against FLOPs, and against latency on each device that it was measured on.

    Args:
      lines: Runs of one network on one data set; those of a line differ in the seed alone.
      styles: Color and marker of every method.
    """
    caption = "Top-1 accuracy against the kept fraction of the"
    yield Plot(f"{caption} FLOPs", _figure(lines, styles, _flops_kept, "FLOPs kept (%)"))
    for where in dict.fromkeys(run.latency_measured_on for run in itertools.chain(*lines)):
        those = [found for runs in lines if (found := [run for run in runs if run.latency_measured_on == where])]
        yield Plot(f"{caption} latency of {where}", _figure(those, styles, latency_kept, "latency kept (%)"))


def _flops_kept(run: Report) -> float:
    return 100 - run.flops_reduction


def latency_kept(run: Report) -> float:
    """The pruned network's latency in percent of the unpruned one's."""
    return 100 / run.latency_ms.speedup


def _figure(
    lines: Sequence[Sequence[Report]], styles: Mapping[str, Style], cost: Callable[[Report], float], label: str
) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    draw(figures.plain_axes(figure), lines, styles, cost, label)
    add_legend(figure)
    return figure


def draw(
    axes: Axes,
    lines: Sequence[Sequence[Report]],
    styles: Mapping[str, Style],
    cost: Callable[[Report], float],
    label: str,
) -> None:
    """Draws the methods, the unpruned network and the Pareto front.

    Args:
      axes: Where to.
      lines: Runs of one network on one data set; those of a line differ in the seed alone.
      styles: Color and marker of every method.
      cost: What a run costs, in percent of the unpruned network.
      label: Label of the cost.
    """
    points = [_draw_line(axes, runs, styles[runs[0].method_name], cost) for runs in lines]
    points += _draw_bases(axes, list(itertools.chain(*lines)))
    best = front(points)
    axes.plot(*zip(*best, strict=True), color=figures.TEXT, linewidth=1, drawstyle="steps-post", zorder=1)
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 accuracy (%)")


def add_legend(figure: Figure) -> None:
    """Adds a legend below all plots of a figure, with each method once, in as many columns as fit."""
    entries = itertools.chain(*(zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes))
    handles = {label: handle for handle, label in entries}
    names = _without_shared_form(list(handles))
    longest = _LEGEND_INCHES[0] + _LEGEND_INCHES[1] * max(map(len, names))
    columns = max(int(figure.get_figwidth() / longest), 1)
    figure.legend(handles.values(), names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _without_shared_form(labels: Sequence[str]) -> list[str]:
    """The labels without the form in parentheses that all methods have: it does not tell them apart."""
    forms = {label.partition(" (")[2] for label in labels if label not in ("base", CONTROL)}
    return [label.partition(" (")[0] for label in labels] if len(forms) == 1 and "" not in forms else list(labels)


def _draw_line(
    axes: Axes, runs: Sequence[Report], style: Style, cost: Callable[[Report], float]
) -> tuple[float, float]:
    """Draws the point of a method, with its standard deviation over seeds, and returns it."""
    costs, accuracies = [cost(run) for run in runs], [run.pruned_top1 for run in runs]
    point = statistics.fmean(costs), statistics.fmean(accuracies)
    color, marker = style
    axes.errorbar(
        *point,
        xerr=_deviation(costs),
        yerr=_deviation(accuracies),
        fmt=marker,
        color=color,
        markersize=8,
        markeredgecolor=figures.TEXT,
        markeredgewidth=0.7,
        label=figures.literal(runs[0].method_name),
    )
    return point


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _draw_bases(axes: Axes, runs: Sequence[Report]) -> list[tuple[float, float]]:
    """Draws the unpruned network, as it was and fine-tuned in the same way, and returns the points."""
    of_seeds = {"base": {(run.seed, run.base_top1) for run in runs}}
    of_seeds[CONTROL] = {(run.seed, run.control_top1) for run in runs if run.control_top1 is not None}
    points = {name: (100.0, statistics.fmean(top1 for _, top1 in found)) for name, found in of_seeds.items() if found}
    for (name, point), filled in zip(points.items(), (True, False), strict=False):
        face = figures.TEXT if filled else "none"
        axes.plot(*point, "*", color=figures.TEXT, markerfacecolor=face, markersize=12, label=name)
    return list(points.values())


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) than which no other is both at most as dear and at least as accurate, the cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > (best[-1][1] if best else -math.inf):
            best.append((cost, accuracy))
    return best
