"""Searches with several settings and seeds from one base network; their curves are written as CSV and plotted.

The seeds of a setting are searched in one vmapped search, or in several. Each such search is a run of the pipeline in
its own folder of the workdir, and the same command resumes it. The base network is trained (or loaded) once.

During a search the network is regularly pruned to the budget and evaluated on the test images. These accuracies have no
effect on the search. In early steps the search has not reached the budget yet, so the pruned network has fewer channels
than the search proposes; the same holds for a search that ends above the budget.
"""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from ddnp_jax import data, files, methods, parallel, pipeline
from ddnp_jax.config import typed
from ddnp_jax.pipeline import report
from ddnp_jax.training.log import MetricsLog
from experiments.shared import SEEDS, shared_base

AT_ONCE = flags.DEFINE_integer(
    "seeds_at_once", 3, "Number of seeds per vmapped search on the same batches; 1 if memory is short.", lower_bound=1
)
CHOSEN = flags.DEFINE_multi_string(
    "setting", [], "Name of a setting to run, as in the figure; may be repeated; default: all settings."
)

Settings = Mapping[str, Mapping[str, Any]]  # the fields of the configuration to change, by name of the setting
Curves = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]  # lines of the search's log, by (setting, seed)


class Panel(NamedTuple):
    """One plot of a figure.

    Attributes:
      title: Title above the plot.
      metric: Name of the metric on the vertical axis, as in the log.
      label: Label of the vertical axis.
      settings: Names of the settings to plot.
      scale: Factor by which the metric is multiplied.
    """

    title: str
    metric: str
    label: str
    settings: Sequence[str]
    scale: float = 1.0


TEST_TOP1 = ("test_top1", "test top-1, cut to p (%)")  # metric and label of a panel


def draw(config: ConfigDict, workdir: str | Path, title: str, settings: Settings, panels: Sequence[Panel]) -> str:
    """Runs the searches that the command line selects, and draws every plot whose settings are all among them.

    Args:
      config: Configuration of all searches.
      workdir: Folder of all searches.
      title: Title of the figure; network and data set are added.
      settings: All settings of the figure.
      panels: All plots of the figure.

    Returns:
      The last line of output of the command.

    Raises:
      ValueError: A setting is unknown or does not match the configuration, or no plot has only selected settings.
    """
    chosen = list(dict.fromkeys(CHOSEN.value)) or list(settings)
    if unknown := [name for name in chosen if name not in settings]:
        raise ValueError(f"--setting={unknown[0]!r} is unknown; use one of {', '.join(map(repr, settings))}.")
    drawn = [panel for panel in panels if set(panel.settings) <= set(chosen)]
    if not drawn:
        raise ValueError("no plot of the figure shows only the settings of --setting; give all settings of a plot.")
    curves = run(config, workdir, {name: settings[name] for name in chosen}, SEEDS.value, AT_ONCE.value)
    return publish(Path(workdir), f"{title}, {config.model.name}, {data.label(typed(config).data)}", drawn, curves)


def run(config: ConfigDict, workdir: str | Path, settings: Settings, seeds: int, at_once: int) -> Curves:
    """Runs, or resumes, the search of every setting for seeds 0, 1, ...; writes `curves.csv`.

    Args:
      config: Configuration of all searches.
      workdir: Folder of all searches.
      settings: Fields of the configuration to change, by setting.
      seeds: Number of seeds per setting.
      at_once: Number of seeds per vmapped search; they share the same batches.

    Raises:
      ValueError: A setting does not match the configuration, or the log of a search is damaged.
    """
    workdir = Path(workdir).absolute()
    groups = [range(first, min(first + at_once, seeds)) for first in range(0, seeds, at_once)]
    runs = {
        (name, group): setting_config(config, fields, group[0]) for name, fields in settings.items() for group in groups
    }
    with pipeline.locked(workdir):
        _, weights = shared_base(config, workdir / "base")
        curves = {}
        for (name, group), own in runs.items():
            own.base.weights = str(weights)
            job = pipeline.prepare(own, workdir / re.sub(r"\W+", "-", name) / "-".join(map(str, group)))
            with job.guard:
                pipeline.search_curves(job, job.weights, group)
            curves |= {(name, seed): _curve(job.log, seed) for seed in group}
        parallel.on_first_process(lambda: _write_csv(workdir / "curves.csv", curves))
    return curves


def _curve(log: MetricsLog, seed: int) -> list[dict[str, Any]]:
    """The log lines of one seed, with its metrics under their plain names."""
    prefix = methods.seed_metric(seed, "")
    return [
        {"step": line["step"]} | {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        for line in log.lines("search")
    ]


def setting_config(config: ConfigDict, fields: Mapping[str, Any], seed: int) -> ConfigDict:
    """Returns the configuration of one search.

    Raises:
      ValueError: The configuration lacks a field of the setting.
    """
    own = ConfigDict(config.copy_and_resolve_references())
    try:
        own.update_from_flattened_dict({**fields, "seed": seed, "search.test_curve": True})
    except KeyError as error:
        name = re.search(r"\w+", str(error.args[0]).removeprefix("Key "))
        raise ValueError(
            f"this figure sets search.{name[0] if name else '*'}, which search.method={config.search.method!r} lacks; "
            "give --config the argument for the figure's method, as in the command at the top of its module."
        ) from error
    return own


def _write_csv(path: Path, curves: Curves) -> None:
    rows = [{"setting": name, "seed": seed, **line} for (name, seed), lines in curves.items() for line in lines]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, columns)
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, content.getvalue())


def mean_and_deviation(curves: Curves, setting: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the logged steps of a setting, and mean and sample standard deviation (0 for one seed) over the seeds."""
    values: dict[int, list[float]] = {}
    for (name, _), lines in curves.items():
        for line in lines if name == setting else ():
            if metric in line:
                values.setdefault(line["step"], []).append(line[metric])
    steps = np.array(sorted(values))
    mean = np.array([np.mean(values[step]) for step in steps])
    deviation = np.array([np.std(values[step], ddof=1) if len(values[step]) > 1 else 0.0 for step in steps])
    return steps, mean, deviation


def publish(workdir: Path, title: str, panels: Sequence[Panel], curves: Curves) -> str:
    """Writes `figures.png` and `summary.md`; returns the last line of output of the command."""
    metrics = dict.fromkeys(panel.metric for panel in panels)

    def write() -> None:
        report.write_figure(workdir / "figures.png", figure(title, panels, curves))
        files.write_text(workdir / "summary.md", summary(curves, metrics) + "\n")

    parallel.on_first_process(write)
    return f"figure: {workdir}/figures.png; last values: {workdir}/summary.md"


def figure(title: str, panels: Sequence[Panel], curves: Curves) -> Figure:
    """Draws a plot per panel: the mean of every setting as a line, its standard deviation as a shaded area."""
    columns = math.ceil(math.sqrt(len(panels)))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.8 * rows), layout="constrained")
    seeds = len({seed for _, seed in curves})
    spread = f"{seeds} seeds, mean and standard deviation" if seeds > 1 else "one seed"
    figure.suptitle(f"{title}; {spread}", fontsize=11)
    for place, panel in enumerate(panels):
        axes = report.plain_axes(figure, rows, columns, place)
        for setting, color in zip(panel.settings, itertools.cycle(report.COLORS), strict=False):
            steps, mean, deviation = mean_and_deviation(curves, setting, panel.metric)
            mean, deviation = panel.scale * mean, panel.scale * deviation
            axes.plot(steps, mean, color=color, label=setting)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        axes.set(title=panel.title, xlabel="search step", ylabel=panel.label)
        axes.legend(frameon=False, fontsize=8)
    return figure


def summary(curves: Curves, metrics: Iterable[str]) -> str:
    """The last logged values of every setting as a Markdown table, mean ± standard deviation over several seeds."""
    metrics = list(metrics)
    header = ["setting", *metrics]
    rows = []
    for setting in dict.fromkeys(name for name, _ in curves):
        cells, has_seeds = [setting], sum(name == setting for name, _ in curves) > 1
        for metric in metrics:
            _, mean, deviation = mean_and_deviation(curves, setting, metric)
            spread = f" ± {deviation[-1]:.3f}" if has_seeds and len(mean) else ""
            cells.append(f"{mean[-1]:.3f}{spread}" if len(mean) else "-")
        rows.append(cells)
    return report.table(header, rows)
