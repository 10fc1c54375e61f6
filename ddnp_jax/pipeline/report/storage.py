"""The files of a report: written into the workdir, and read again."""

import json
from pathlib import Path
from typing import Any

from ddnp_jax import fields, files, parallel
from ddnp_jax.pipeline.report import figures, markdown, page, text
from ddnp_jax.pipeline.report.schema import Report
from ddnp_jax.training.log import MetricsLog

_ADVICE = "run the command of that run again to rewrite its report"


def write(workdir: str | Path, report: Report) -> dict[str, Any]:
    """Writes the report into the workdir, as text, as a page and as data.

    These are `report.md`, `report.html`, `widths.png`, `search.png` and, when they are complete, `report.json`.
    `search.png` needs the lines of the search in `metrics.jsonl`. In a run of several processes all may call; the first
    one writes.

    Args:
      workdir: Folder of the run, with its `metrics.jsonl`.
      report: Result of the run.

    Returns:
      What `report.json` holds.

    Raises:
      ValueError: `metrics.jsonl` is damaged.
    """
    parallel.on_first_process(lambda: _write_files(Path(workdir), report))
    return report.to_json()


def _write_files(workdir: Path, report: Report) -> None:
    search = MetricsLog(workdir / "metrics.jsonl").lines("search")
    drawn = {"widths": figures.widths_figure(report)}
    if search:
        drawn["search"] = figures.search_figure(report, search)
    lead, sections = text.headline(report), text.sections(report, has_curve=bool(search))
    files.write_text(workdir / "report.md", markdown.document(report.title, lead, sections))
    html = page.document(report.title, lead, sections, drawn, text.key_figures(report))
    files.write_text(workdir / "report.html", html)
    for name, figure in drawn.items():
        figures.write_figure(workdir / f"{name}.png", figures.titled(figure, text.CAPTIONS[name], report))
    files.write_json(workdir / "report.json", report.to_json())


def read(path: str | Path) -> Report:
    """Reads a `report.json`, of this version or an older one.

    Raises:
      ValueError: The file is damaged or lacks a key; the message names both.
      OSError: The file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; name the report.json of a run that has ended.")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_ADVICE}.") from error
    try:
        report = fields.built(Report, _with_budget(values))
        _check(report)
        return report
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_ADVICE}.") from error


def _check(report: Report) -> None:
    """Raises for what no network costs: the changes that a report gives are parts of these."""
    for name, value in {
        "flops_total_before": report.flops_total_before,
        "params_before": report.params_before,
        "budget.before": report.budget.before,
        "latency_ms.before": report.latency_ms.before,
        "latency_ms.after": report.latency_ms.after,
    }.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")


def _with_budget(values: Any) -> Any:
    """The values of a file; before there was a choice, every budget was of FLOPs, and the file does not say so."""
    keys = ("flops_prunable_before", "flops_prunable_after")
    if not isinstance(values, dict) or "budget" in values or not values.keys() >= {*keys}:
        return values
    before, after = (values[key] for key in keys)
    return {**values, "budget": {"kind": "flops", "unit": "prunable FLOPs", "before": before, "after": after}}
