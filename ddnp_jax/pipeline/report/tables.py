"""The tables of a report."""

import statistics
from collections.abc import Sequence

from ddnp_jax.config import STAGES, Stage
from ddnp_jax.pipeline.report.blocks import Table
from ddnp_jax.pipeline.report.schema import Report, Training

CONTROL = "base, fine-tuned in the same way"  # how a report calls the control
_STAGES: dict[Stage, str] = {
    "base": "base training",
    "search": "search",
    "finetune": "fine-tuning",
    "control": "fine-tuning of the base",
}


def mean(values: Sequence[float | None], form: str = ".2f") -> str:
    """Mean, and of several values the sample standard deviation; "-" where one of them is None."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    found = format(statistics.fmean(known), form)
    return f"{found} ± {format(statistics.stdev(known), form.lstrip('+z'))}" if len(known) > 1 else found


def change(before: float, after: float) -> str:
    """A relative change in percent."""
    return f"{100 * (after / before - 1):+z.2f} %"


def result_table(report: Report) -> Table:
    """Accuracy and size of every network, and what pruning has changed."""
    base, pruned = (report.base_top1, report.base_top5), (report.pruned_top1, report.pruned_top5)
    before, after, changes = sizes(report)
    networks = [
        ("base", base, before),
        *([(CONTROL, report.control, before)] if report.control else []),
        ("pruned, before fine-tuning", (report.unfinetuned_top1, report.unfinetuned_top5), after),
        ("pruned, after fine-tuning", pruned, after),
    ]
    deltas = [f"{ours - theirs:+z.2f}" for ours, theirs in zip(pruned, report.control or base, strict=True)]
    count = 2 if report.has_top5 else 1  # accuracies per row
    rows = [[name, *(f"{each:.2f}" for each in shown[:count]), *size] for name, shown, size in networks]
    what = "change, both fine-tuned" if report.control else "change, base to fine-tuned"
    header = ["network", *("top-1 (%)", "top-5 (%)")[:count], "FLOPs", "parameters", "latency (ms)"]
    rows.append([what, *deltas[:count], *changes])
    return Table(header, rows, has_total=True)


def sizes(report: Report) -> tuple[list[str], list[str], list[str]]:
    """FLOPs, parameters and milliseconds of the unpruned network, of the pruned one, and their changes."""
    before = (report.flops_total_before, report.params_before, report.latency_ms.before)
    after = (report.flops_total_after, report.params_after, report.latency_ms.after)
    return _size(*before), _size(*after), list(map(change, before, after))


def _size(flops: float, params: int, milliseconds: float) -> list[str]:
    return [f"{flops / 1e6:,.3f} M", f"{params / 1e6:,.3f} M", f"{milliseconds:.2f}"]


def speed_table(report: Report) -> Table:
    """Measured times and speed-ups, beside what the FLOPs imply."""
    rows = [
        [
            each.runtime,
            str(each.batch),
            f"{each.before:.2f}",
            f"{each.after:.2f}",
            f"{each.speedup:.2f}",
            f"{report.flops_speedup:.2f}",
            f"{each.speedup / report.flops_speedup:.2f}",
        ]
        for each in report.latencies
    ]
    return Table(["runtime", "batch", "base (ms)", "pruned (ms)", "speed-up", "FLOPs imply", "ratio"], rows)


def export_table(report: Report) -> Table:
    """The exported files, and how near each is to the network."""
    rows = []
    for found in report.exports.values():
        path, file = next(iter(found.files.items()))
        rows.append(
            [
                f"`{path}`",
                f"{file.bytes:,}",
                f"{found.max_difference:.1e}",
                f"{100 * found.argmax_agreement:.2f}",
                "-" if found.top1 is None else f"{found.top1:.2f}",
            ]
        )
    return Table(["file", "bytes", "largest difference", "same predictions (%)", "top-1 (%)"], rows)


def stage_table(report: Report) -> Table:
    """What every stage learned from, and how long it took."""
    stages = [stage for stage in STAGES if stage != "control" or report.was_run("control")]
    rows = [[_STAGES[stage], *_stage_figures(report, stage)] for stage in stages]
    total = sum(report.seconds.of(stage) for stage in stages)
    rows.append(["all", "", "", "", "", f"{total:,.0f}"])
    return Table(["stage", "images", "epochs", "batch", "learning rate", "seconds"], rows, has_total=True)


def _stage_figures(report: Report, stage: Stage) -> list[str]:
    if stage not in report.training:
        return ["-", "-", "-", "-", "not run"]
    training = report.training[stage]
    return [
        f"{training.images:,}",
        f"{report.epochs.of(stage):g}",
        str(training.batch_size),
        _learning_rates(training),
        f"{report.seconds.of(stage):,.0f}",
    ]


def _learning_rates(training: Training) -> str:
    """The learning rate, or that of each optimizer by its short name; "-" where nothing is learned by gradients."""
    rates = {name.removesuffix("_optimizer"): f"{rate:g}" for name, rate in training.learning_rates.items()}
    if len(rates) < 2:
        return "".join(rates.values()) or "-"
    return ", ".join(f"{rate} ({name})" for name, rate in rates.items())


def width_table(report: Report) -> Table:
    """The channels of every gate."""
    gates = zip(report.gate_names, report.widths_before, report.widths, strict=True)
    rows = [_width_row(f"`{name}`", before, after) for name, before, after in gates]
    rows.append(_width_row("all", sum(report.widths_before), sum(report.widths)))
    return Table(["gate", "before", "after", "kept (%)"], rows, has_total=True)


def _width_row(name: str, before: int, after: int) -> list[str]:
    return [name, str(before), str(after), f"{100 * after / before:.1f}"]
