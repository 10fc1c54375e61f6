"""What a run has shown: `report.json`, `report.md` and two pictures; and one table over several runs.

Accuracies and reductions are percent. Figures are rounded once, where they are printed; `report.json` keeps all digits.
"""

import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddnp_jax import files, parallel

STAGES = {"base": "base training", "search": "search", "finetune": "fine-tuning"}
CONVENTIONS = {
    "macs": "multiply-accumulates of convolutions and dense layers",
    "authors": "the DDNP authors' count: multiply-accumulates, and 3 per output element of prunable layers",
}

_RESULTS = (
    *("method", "model", "dataset", "seed", "p", "flops_convention"),
    *(f"budget.{key}" for key in ("kind", "unit", "before", "after")),
    *("base_top1", "base_top5", "unfinetuned_top1", "unfinetuned_top5", "pruned_top1", "pruned_top5", "test_images"),
    *("flops_total_before", "flops_total_after", "flops_prunable_before", "flops_prunable_after"),
    *("params_before", "params_after", "gate_names", "widths_before", "widths"),
    *(f"{table}.{stage}" for table in ("seconds", "epochs") for stage in STAGES),
    *("batch_norm", "precision", "devices", "latency_ms"),
    *("verification.max_difference", "verification.argmax_agreement", "notes"),
)
_COMPARED = (
    *("method", "model", "dataset", "seed", "p", "flops_convention", "flops_reduction", "params_reduction"),
    *("base_top1", "unfinetuned_top1", "pruned_top1", "delta_top1"),
    *(f"{table}.{stage}" for table in ("seconds", "epochs") for stage in STAGES),
)

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BLUE, _VERMILION, *_ = COLORS
_LIGHT_BLUE = "#C3DDEE"


def write(workdir: str | Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `report.md`, `widths.png`, `search.png` and, when these are complete, `report.json` into the workdir.

    `search.png` is left out where `metrics.jsonl` has no lines of a search, as with one-shot methods. In a run of
    several processes all may call; the first one writes.

    Args:
      workdir: of the run, with its `metrics.jsonl`.
      results: of the run, JSON values only: `method`, `model`, `dataset`, `seed`, `p`, `flops_convention`;
        `budget` with its `kind`, `unit`, and the cost `before` and `after`, all of them in that unit;
        `{base,unfinetuned,pruned}_{top1,top5}`, percent, on `test_images` test images;
        `flops_{total,prunable}_{before,after}`, `params_{before,after}`; `gate_names`, `widths_before`, `widths`, one
        entry per gate; `seconds` and `epochs`, by stage (0 seconds: the stage was not run); `batch_norm`, `precision`,
        `devices`; `latency_ms` with `batch`, `before` and `after`, or None; `verification` with `max_difference` and
        `argmax_agreement` (a fraction); `notes`, sentences. Optional: `variant`, `best_pruned_validation_top1`,
        `preprocessing`, of `Dataset.serving`.

    Returns:
      What `report.json` holds: `results` and, derived from them, `delta_top1`, `delta_top5`, `flops_reduction` (of the
      whole network), `params_reduction` and `p_reached`.

    Raises:
      ValueError: a key is missing or contradicts another, or `metrics.jsonl` is damaged.
    """
    _check(results)
    report = {**results, **_derived(results)}
    parallel.on_first_process(lambda: _write_files(Path(workdir), report))
    return report


def _write_files(workdir: Path, report: Mapping[str, Any]) -> None:
    search = _search_lines(workdir / "metrics.jsonl")
    write_figure(workdir / "widths.png", _widths_figure(report))
    if search:
        write_figure(workdir / "search.png", _search_figure(report, search))
    files.write_text(workdir / "report.md", _markdown(report, has_search=bool(search)))
    files.write_json(workdir / "report.json", report)


def compare(reports: Sequence[Mapping[str, Any]]) -> str:
    """One table over several runs, the runs that differ in the seed alone in one line.

    Args:
      reports: what their `report.json` hold.

    Returns:
      Markdown; several seeds as mean ± sample standard deviation.

    Raises:
      ValueError: a key is missing, or two runs of one line have the same seed.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for i, report in enumerate(reports):
        _require(report, _COMPARED, f"report {i + 1}")
        epochs = tuple(_epochs(report, stage) for stage in STAGES)
        key = (_method(report), report["model"], report["dataset"], _p(report), report["flops_convention"], epochs)
        groups.setdefault(key, []).append(report)
    header = ["method", "model", "data set", "p", "FLOPs as", "fine-tuning epochs", "seeds"]
    header += ["FLOPs removed (%)", "parameters removed (%)"]
    header += ["base top-1 (%)", "before fine-tuning", "after fine-tuning", "change", "seconds"]
    rows = [
        [method, model, dataset, p, convention, epochs[-1], str(len(runs)), *_compared_figures(runs)]
        for (method, model, dataset, p, convention, epochs), runs in groups.items()
    ]
    foot = "Several seeds: mean ± sample standard deviation. Accuracies: test set, last epoch. Seconds: all stages."
    return f"{table(header, rows, text_columns=3)}\n\n{foot}\n"


def _compared_figures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ValueError(
            f"Two reports of {_method(runs[0])} on {runs[0]['model']} with p={_p(runs[0])} have seed {twice}; "
            "give each run once, and runs that differ in more than the seed different values of config.variant."
        )

    def figure(value: Callable[[Mapping[str, Any]], float], form: str = ".2f") -> str:
        values = [value(run) for run in runs]
        mean = format(statistics.fmean(values), form)
        return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+z'))}" if len(runs) > 1 else mean

    return [
        figure(lambda run: run["flops_reduction"]),
        figure(lambda run: run["params_reduction"]),
        figure(lambda run: run["base_top1"]),
        figure(lambda run: run["unfinetuned_top1"]),
        figure(lambda run: run["pruned_top1"]),
        figure(lambda run: run["delta_top1"], "+z.2f"),
        figure(lambda run: sum(run["seconds"].values()), ".0f"),
    ]


def _require(values: Mapping[str, Any], keys: Iterable[str], what: str) -> None:
    for key in keys:
        inner: Any = values
        for part in key.split("."):
            if not isinstance(inner, Mapping) or part not in inner:
                raise ValueError(f"{what} has no {key!r}; every report needs it.")
            inner = inner[part]


def _check(results: Mapping[str, Any]) -> None:
    _require(results, _RESULTS, "results")
    if results["latency_ms"] is not None:
        _require(results, ("latency_ms.batch", "latency_ms.before", "latency_ms.after"), "results")
    if results["flops_convention"] not in CONVENTIONS:
        known = " or ".join(map(repr, CONVENTIONS))
        raise ValueError(f"flops_convention={results['flops_convention']!r} is unknown to the report; use {known}.")
    lengths = {key: len(results[key]) for key in ("gate_names", "widths_before", "widths")}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"{counts} entries; give one per gate in each.")


def _derived(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        "delta_top1": results["pruned_top1"] - results["base_top1"],
        "delta_top5": results["pruned_top5"] - results["base_top5"],
        "flops_reduction": 100 * (1 - results["flops_total_after"] / results["flops_total_before"]),
        "params_reduction": 100 * (1 - results["params_after"] / results["params_before"]),
        "p_reached": results["budget"]["after"] / results["budget"]["before"],
    }


def _search_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the search; none where nothing was logged."""
    entries = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error}); repair or delete the line.") from error
    return [entry for entry in entries if entry["stage"] == "search"]


def _markdown(report: Mapping[str, Any], has_search: bool) -> str:
    r = report
    parts = [
        f"# {_title(r)}",
        f"{r['method']} pruned {r['model']} on {r['dataset']} (seed {r['seed']}): {r['flops_reduction']:.2f} % of the "
        f"FLOPs and {r['params_reduction']:.2f} % of the parameters removed, top-1 accuracy {r['base_top1']:.2f} % "
        f"before and {r['pruned_top1']:.2f} % after ({r['delta_top1']:+z.2f} points).",
        _result_table(r),
        f"FLOPs: {CONVENTIONS[r['flops_convention']]}; whole network. {_latency_sentence(r)}",
        "![Channels per gate, before and after](widths.png)",
        f"## Budget\n\n{_budget(r)}",
        f"## How the figures were taken\n\n{_bullets(_methodology(r))}",
    ]
    if r["notes"]:
        parts.append(f"## Notes\n\n{_bullets(r['notes'])}")
    parts.append(f"## Time\n\nOn {r['devices']}.\n\n{_time_table(r)}")
    picture = "![Accuracy and cost over the search](search.png)"
    parts.append(f"## Search\n\n{picture if has_search else 'This method has no search; it selects in one shot.'}")
    parts.append(f"## Channels per gate\n\n{_width_table(r)}")
    return "\n\n".join(parts) + "\n"


def _title(report: Mapping[str, Any]) -> str:
    return f"{_method(report)}, {report['model']} on {report['dataset']}, p = {_p(report)}"


def _p(report: Mapping[str, Any]) -> str:
    """p, and of what where it is not of FLOPs; reports written before there was a choice are of FLOPs."""
    kind = report.get("budget", {}).get("kind", "flops")
    return f"{report['p']:g}" if kind == "flops" else f"{report['p']:g} ({kind})"


def _method(report: Mapping[str, Any]) -> str:
    variant = report.get("variant", "default")
    return report["method"] if variant in ("default", report["method"]) else f"{report['method']} ({variant})"


def _result_table(report: Mapping[str, Any]) -> str:
    def row(name: str, accuracy: str, size: str) -> list[str]:
        top1, top5 = report[f"{accuracy}_top1"], report[f"{accuracy}_top5"]
        flops, params = report[f"flops_total_{size}"], report[f"params_{size}"]
        figures = [f"{top1:.2f}", f"{top5:.2f}", f"{flops / 1e6:,.3f} M", f"{params / 1e6:,.3f} M"]
        return [name, *figures, f"{latency[size]:.2f}" if latency else "-"]

    latency = report["latency_ms"]
    difference = [
        *(f"{report['delta_top1']:+z.2f}", f"{report['delta_top5']:+z.2f}"),
        _change(report["flops_total_before"], report["flops_total_after"]),
        _change(report["params_before"], report["params_after"]),
        _change(latency["before"], latency["after"]) if latency else "-",
    ]
    rows = [
        row("base", "base", "before"),
        row("pruned, before fine-tuning", "unfinetuned", "after"),
        row("pruned, after fine-tuning", "pruned", "after"),
        ["change, base to fine-tuned", *difference],
    ]
    return table(["network", "top-1 (%)", "top-5 (%)", "FLOPs", "parameters", "latency (ms)"], rows)


def _latency_sentence(report: Mapping[str, Any]) -> str:
    if report["latency_ms"] is None:
        return "Latency was not measured."
    where = report["devices"] if report["devices"].startswith("1 x ") else f"one of {report['devices']}"
    return f"Latency: forward pass of a batch of {report['latency_ms']['batch']} on {where}."


def _budget(report: Mapping[str, Any]) -> str:
    budget = report["budget"]
    total, after = budget["before"], budget["after"]
    wanted = report["p"] * total
    channel = total / sum(report["widths_before"])

    def amount(cost: float) -> str:
        return f"{cost:,.3f}" if budget["kind"] == "latency" else f"{cost / 1e6:,.3f} M"

    text = (
        f"Wanted: at most p = {report['p']:.4f} of {amount(total)} {budget['unit']}, {amount(wanted)}. "
        f"Reached: p = {report['p_reached']:.4f}, {amount(after)}. "
    )
    if budget["kind"] == "latency":
        text += f"{_predicted_and_measured(report)} "
    if after > wanted * (1 + 1e-6):
        return text + f"**The budget is exceeded by {amount(after - wanted)}.**"
    unused = wanted - after
    if unused > channel:
        return text + (
            f"**The budget is missed by more than one channel's rounding**: {amount(unused)} are unused, "
            f"{unused / channel:.1f} times an average channel of the unpruned network."
        )
    return text + "The difference is less than one channel of average cost."


def _predicted_and_measured(report: Mapping[str, Any]) -> str:
    predicted, measured = report["budget"], report["latency_ms"]
    text = (
        f"These are the table's times of the convolution and dense layers, each measured by itself "
        f"({_change(predicted['before'], predicted['after'])})"
    )
    if measured is None:
        return f"{text}; the whole network was not measured."
    before, after, batch = (measured[key] for key in ("before", "after", "batch"))
    return (
        f"{text}; the whole network was measured at {before:,.3f} ms before and {after:,.3f} ms after "
        f"({_change(before, after)}, batch {batch})."
    )


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+z.2f} %"


def _methodology(report: Mapping[str, Any]) -> list[str]:
    best = report.get("best_pruned_validation_top1")
    found = "" if best is None else f" (it reached {best:.2f} % there in fine-tuning)"
    verification = report["verification"]
    agreement = 100 * verification["argmax_agreement"]
    return [
        f"Accuracies are those of the last epoch, over all {report['test_images']:,} test images, each counted once.",
        f"The best checkpoint is chosen on held-out training images{found} and is not what this report shows; no test "
        "image decided anything in this run.",
        f"Check of the cut: the logits of the smaller and of the masked network differ by at most "
        f"{verification['max_difference']:.1e}; {agreement:.2f} % of the predictions agree.",
        f"Batch-norm statistics in training: {report['batch_norm']}. Precision: {report['precision']}.",
        *_pixels(report),
    ]


def _pixels(report: Mapping[str, Any]) -> list[str]:
    """What was done to the images; reports written before it was kept do not say."""
    done = report.get("preprocessing")
    if done is None:
        return []
    mean, std = (", ".join(f"{value:.4g}" for value in done[name]) for name in ("mean", "std"))
    return [f"Pixels, times {done['scale']:.4g}, less the mean ({mean}), are divided by the deviation ({std})."]


def _epochs(report: Mapping[str, Any], stage: str) -> str:
    return f"{report['epochs'][stage]:g}" if report["seconds"][stage] else "-"


def _time_table(report: Mapping[str, Any]) -> str:
    rows = []
    for stage, name in STAGES.items():
        seconds = report["seconds"][stage]
        rows.append([name, _epochs(report, stage), f"{seconds:,.0f}" if seconds else "not run"])
    rows.append(["all", "", f"{sum(report['seconds'].values()):,.0f}"])
    return table(["stage", "epochs", "seconds"], rows)


def _width_table(report: Mapping[str, Any]) -> str:
    gates = zip(report["gate_names"], report["widths_before"], report["widths"], strict=True)
    rows = [[f"`{name}`", str(before), str(after), f"{100 * after / before:.1f}"] for name, before, after in gates]
    before, after = sum(report["widths_before"]), sum(report["widths"])
    rows.append(["all", str(before), str(after), f"{100 * after / before:.1f}"])
    return table(["gate", "before", "after", "kept (%)"], rows)


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A markdown table whose source is aligned too; the columns after the first `text_columns` are figures."""
    lengths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<"] * text_columns + [">"] * (len(header) - text_columns)
    rule = ["-" * n if side == "<" else "-" * (n - 1) + ":" for n, side in zip(lengths, sides, strict=True)]
    lines = [
        " | ".join(f"{cell:{side}{n}}" for cell, side, n in zip(line, sides, lengths, strict=True))
        for line in (header, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _widths_figure(report: Mapping[str, Any]) -> Figure:
    before, after = report["widths_before"], report["widths"]
    places = range(len(before))
    figure = Figure(figsize=(max(6.0, 1.2 + 0.27 * len(before)), 4.5), layout="constrained")
    axes = plain_axes(figure)
    axes.bar(places, before, width=0.8, color=_LIGHT_BLUE, label="before")
    axes.bar(places, after, width=0.8, color=_BLUE, label="after")
    for place, width in zip(places, after, strict=True):
        axes.annotate(str(width), (place, width), (0, 1), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(places, report["gate_names"], rotation=90 if len(before) > 6 else 0, fontsize=8)
    axes.set_xlim(-0.7, len(before) - 0.3)
    axes.set_ylabel("channels")
    axes.set_title(f"Channels per gate\n{_title(report)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _search_figure(report: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Figure:
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
    axes.set_title(f"Accuracy and cost over the search\n{_title(report)}", fontsize=10)
    cost = axes.twinx()
    cost.spines[["top", "left"]].set_visible(False)
    cost.plot(*curve("remaining", 100.0), color=_VERMILION, label="remaining")
    cost.axhline(100.0 * report["p"], color=_VERMILION, linestyle="--", linewidth=1, label=f"p = {report['p']:g}")
    cost.set_ylim(0, 102)
    cost.set_ylabel(f"{report['budget']['unit']} (%)", color=_VERMILION)
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
