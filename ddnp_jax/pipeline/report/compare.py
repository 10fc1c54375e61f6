"""Comparison of several runs: one table, and plots of accuracy against cost."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ddnp_jax.config import STAGES
from ddnp_jax.pipeline.report import markdown, page, pareto
from ddnp_jax.pipeline.report.blocks import Paragraph, Picture, Section, Table
from ddnp_jax.pipeline.report.schema import Report
from ddnp_jax.pipeline.report.tables import CONTROL, mean

_SETTINGS = ("model", "data set", "p", "FLOPs as", "fine-tuning epochs")
_HEADER = (
    *("method", *_SETTINGS, "seeds"),
    *("FLOPs removed (%)", "parameters removed (%)", "base top-1 (%)", "before fine-tuning", "after fine-tuning"),
    *("change", CONTROL, "change to that", "seconds"),
)
# Settings in which the runs of a line may differ.
_WITHOUT_EFFECT = re.compile(
    r"seed|notes|eval_batch_size|search\.test_curve|.*\.(chunk_steps|save_every|mode|cpu_fusions)"
)
_FOOT = (
    "Several seeds: mean ± sample standard deviation. Accuracies: test set, last epoch. Change: from the base to after "
    "fine-tuning. Seconds: base training, search and fine-tuning."
)


def compare(reports: Sequence[Report]) -> str:
    """Returns one table of several runs; runs that differ only in the seed share a row.

    Args:
      reports: Results of the runs.

    Returns:
      Markdown; several seeds as mean ± sample standard deviation.

    Raises:
      ValueError: Two runs of one line have the same seed.
    """
    rows = _rows(lines_of(reports))
    return f"{markdown.table(_HEADER, rows, text_columns=3)}\n\n{_FOOT}\n"


def comparison_html(reports: Sequence[Report]) -> str:
    """Returns the same table as a page, with plots of accuracy against cost for each network and data set.

    Args:
      reports: Results of the runs.

    Returns:
      Self-contained HTML.

    Raises:
      ValueError: Two runs of one line have the same seed.
    """
    lines = lines_of(reports)
    table, common = _shortened(_rows(lines))
    sections = [Section("", [table, Paragraph(_FOOT)])]
    styles = pareto.styles(runs[0].method_name for runs in lines)
    drawn: dict[str, pareto.Plot] = {}
    for runs in tasks_of(reports):
        model, dataset, _ = _task(runs[0])
        plots = {f"plot{len(drawn) + place}": plot for place, plot in enumerate(pareto.plots(lines_of(runs), styles))}
        pictures = [Picture(name, plot.caption) for name, plot in plots.items()]
        sections.append(Section(f"Accuracy and cost, {model} on {dataset}", [*pictures, Paragraph(pareto.LEGEND)]))
        drawn |= plots
    figures = {name: plot.figure for name, plot in drawn.items()}
    return page.document("Comparison of pruned networks", _lead(reports, common), sections, figures)


def _lead(reports: Sequence[Report], common: Sequence[str]) -> str:
    runs = f"{len(reports)} {'run' if len(reports) == 1 else 'runs'}"
    return f"{runs}, all with {', '.join(common)}." if common else f"{runs}."


def _shortened(rows: Sequence[Sequence[str]]) -> tuple[Table, list[str]]:
    """The table without what was never measured and the settings that all lines share, and these."""
    columns = [column for column in zip(_HEADER, *rows, strict=True) if set(column[1:]) != {"-"}]
    shared = [column for column in columns if column[0] in _SETTINGS and len(set(column[1:])) == 1]
    kept = [column for column in columns if column not in shared]
    text_columns = sum(name in ("method", "model", "data set") for name, *_ in kept)
    header, *lines = zip(*kept, strict=True)
    return Table(header, lines, text_columns), [f"{name} {value}" for name, value, *_ in shared]


def lines_of(reports: Iterable[Report]) -> list[list[Report]]:
    """The runs of each line of a table: those that differ in the seed alone."""
    return _grouped(reports, _all_but_the_seed)


def tasks_of(reports: Iterable[Report]) -> list[list[Report]]:
    """The runs of each plot: those of one network on one data set."""
    return _grouped(reports, _task)


def _grouped(reports: Iterable[Report], key: Callable[[Report], Any]) -> list[list[Report]]:
    groups: dict[Any, list[Report]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    return list(groups.values())


def _task(run: Report) -> tuple[str, str, str]:
    """What accuracies and costs must have in common to be compared."""
    return run.model, run.dataset, run.flops_convention


def _all_but_the_seed(report: Report) -> tuple[Any, ...]:
    training = {stage: of for stage, of in report.to_json()["training"].items() if stage != "control"}
    return _named(report), report.precision, json.dumps([training, _settings(report)], sort_keys=True)


def _settings(report: Report) -> dict[str, Any]:
    """The settings that the runs of a line have in common."""
    return {name: value for name, value in report.settings.items() if not _WITHOUT_EFFECT.fullmatch(name)}


def _named(report: Report) -> tuple[Any, ...]:
    """What the columns of the table say of a run's settings."""
    epochs = (report.epochs.of(stage) if report.was_run(stage) else None for stage in STAGES if stage != "control")
    return report.method_name, report.model, report.dataset, report.p_name, report.flops_convention, *epochs


def _rows(lines: Sequence[Sequence[Report]]) -> list[list[str]]:
    """The lines of the table; those that differ only in settings without a column name these beside the method."""
    rows = []
    for runs in lines:
        # Reports of older versions have no settings.
        alike = [_settings(other[0]) for other in lines if _named(other[0]) == _named(runs[0]) and other[0].settings]
        own = _settings(runs[0])
        differing = [f"{name}={own[name]}" for name in own if any(other.get(name) != own[name] for other in alike)]
        method, *cells = _row(runs)
        rows.append([", ".join([method, *differing]), *cells])
    return rows


def _row(runs: Sequence[Report]) -> list[str]:
    """The line of runs that differ in the seed alone."""
    first, seeds = runs[0], [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ValueError(
            f"Two reports of {first.method_name} on {first.model} with p={first.p_name} have seed {twice} and the same "
            "settings; give each run once."
        )
    return [
        *(first.method_name, first.model, first.dataset, first.p_name, first.flops_convention),
        f"{first.epochs.finetune:g}" if first.was_run("finetune") else "-",
        str(len(runs)),
        mean([run.flops_reduction for run in runs]),
        mean([run.params_reduction for run in runs]),
        mean([run.base_top1 for run in runs]),
        mean([run.unfinetuned_top1 for run in runs]),
        mean([run.pruned_top1 for run in runs]),
        mean([run.delta_top1 for run in runs], "+z.2f"),
        mean([run.control_top1 for run in runs]),
        mean([run.delta_control_top1 for run in runs], "+z.2f"),
        mean([run.seconds.base + run.seconds.search + run.seconds.finetune for run in runs], ".0f"),
    ]
