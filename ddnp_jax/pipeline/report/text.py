"""The content of a report, starting with the result."""

from ddnp_jax.pipeline.report import tables
from ddnp_jax.pipeline.report.blocks import Block, Bullets, KeyFigure, Paragraph, Picture, Section
from ddnp_jax.pipeline.report.schema import Report

CONVENTIONS = {
    "macs": "multiply-accumulates of convolutions and dense layers",
    "authors": "the DDNP authors' count: multiply-accumulates, and 3 per output element of prunable layers",
}
CAPTIONS = {"widths": "Channels per gate, before and after", "search": "Accuracy and cost over the search"}
# How the note of a search begins, in report.json files of every version that has one.
_CONVERGED, _NOT_CONVERGED = "The search has converged", "The search has not converged"
_MISSED = 0.04  # of the unpruned network's time: a latency budget that is missed by more than measurement noise
_FASTER = 0.98  # a latency ratio below this is more than measurement noise
_GUESSED = 1.2  # times the accuracy of guessing: an unpruned network below this has not learned


def sections(report: Report, has_curve: bool) -> tuple[Section, ...]:
    """Returns the content of a report, independent of its output format.

    Args:
      report: Result of the run.
      has_curve: Whether there is a plot of the search.
    """
    parts = (
        Section("", [*_result(report), _picture("widths")]),
        Section("Speed", [tables.speed_table(report), Paragraph(_speed(report))]),
        Section("Exported files", _exports(report)),
        Section("Search", _search(report, has_curve)),
        Section("Budget", [Paragraph(_budget(report))]),
        Section("How the figures were taken", [Bullets(_methodology(report))]),
        Section("Notes", _notes(report)),
        Section("Stages", [Paragraph(f"On {report.devices}."), tables.stage_table(report)]),
        Section("Channels per gate", [tables.width_table(report)]),
    )
    return tuple(part for part in parts if part.blocks)


def key_figures(report: Report) -> tuple[KeyFigure, ...]:
    """Accuracy, FLOPs, latency and size of the pruned network, each beside the unpruned one's."""
    delta, base = report.delta_control_top1, f"the {tables.CONTROL}"
    if delta is None:
        delta, base = report.delta_top1, "the base"
    flops, parameters, latency = zip(*tables.sizes(report), strict=True)
    return (
        KeyFigure("Top-1 accuracy", f"{report.pruned_top1:.2f} %", [f"{delta:+z.2f} points against {base}"]),
        _cut("FLOPs", *flops),
        _cut("Measured latency", *latency, " ms", f"batch {report.latency_ms.batch}"),
        _cut("Parameters", *parameters, "", *_exported_bytes(report)),
    )


def _cut(name: str, before: str, after: str, changed: str, unit: str = "", *remarks: str) -> KeyFigure:
    """What pruning made smaller."""
    return KeyFigure(name, f"{after}{unit}", [changed, f"{before}{unit} before", *remarks])


def _exported_bytes(report: Report) -> list[str]:
    networks = {form: next(iter(found.files.values())) for form, found in report.exports.items()}
    return [f"{file.bytes:,} bytes as {form}" for form, file in networks.items()]


def _result(report: Report) -> list[Block]:
    """What has come out, and what must be known of it."""
    warnings = (*_untrained(report), *_not_converged(report), *_not_faster(report), *_without_control(report))
    return [
        tables.result_table(report),
        Paragraph(
            f"FLOPs: {CONVENTIONS[report.flops_convention]}; entire network. "
            f"Latency: forward pass of {report.latency_measured_on}."
        ),
        *(Paragraph(text, is_warning=True) for text in warnings),
    ]


def headline(report: Report) -> str:
    """The result in one sentence."""
    removed = (
        f"{report.method} pruned {report.model} on {report.dataset} (seed {report.seed}): "
        f"{report.flops_reduction:.2f} % of the FLOPs and {report.params_reduction:.2f} % of the parameters removed, "
        f"{_time(report)}, "
    )
    if report.control is None:
        return (
            f"{removed}top-1 accuracy {report.base_top1:.2f} % before and {report.pruned_top1:.2f} % after "
            f"({report.delta_top1:+z.2f} points)."
        )
    return (
        f"{removed}top-1 accuracy {report.pruned_top1:.2f} %, against {report.control[0]:.2f} % of the unpruned "
        f"network fine-tuned in the same way ({report.delta_control_top1:+z.2f} points) and {report.base_top1:.2f} % "
        "of that network before it."
    )


def _time(report: Report) -> str:
    """The part of the time that remains: of a budget in latency the one that it counts."""
    if report.budget.kind == "latency":
        return f"at {100 * report.p_reached:.2f} % of the time {report.budget.unit.removeprefix('ms ')}"
    latency = report.latency_ms
    return f"at {100 * latency.after / latency.before:.2f} % of the time (batch {latency.batch}, {latency.runtime})"


def _speed(report: Report) -> str:
    """How the table of times was measured."""
    text = (
        "Medians, base and pruned network measured interleaved. FLOPs imply: the speed-up if time were proportional to "
        "FLOPs; ratio: measured / implied speed-up."
    )
    if any(each.runtime.endswith("int8") for each in report.latencies):
        text += " For int8, the base is in float32."
    return text


def _exports(report: Report) -> list[Block]:
    """The exported files and their check."""
    if not report.exports:
        return []
    images = next(iter(report.exports.values())).compared_images
    text = f"Each was read back and compared with the pruned network on {images:,} test images, given as pixels."
    if any(found.top1 is not None for found in report.exports.values()):
        text += f" Top-1: its own accuracy, over all {report.test_images:,} test images."
    return [tables.export_table(report), Paragraph(text)]


def _not_faster(report: Report) -> list[str]:
    """A paragraph if the pruned network is not faster: why, and what to try."""
    latency = report.latency_ms
    if latency.after < _FASTER * latency.before or report.flops_total_after == report.flops_total_before:
        return []
    in_latency = "With `budget.kind=latency` the budget counts the measured time of each layer. "
    return [
        f"**The pruned network is not faster here**: {latency.before:.2f} ms before, {latency.after:.2f} ms after. The "
        "FLOPs fell and the latency did not: narrow layers leave a device partly idle, and each operation has a cost "
        f"that does not depend on its width. {'' if report.budget.kind == 'latency' else in_latency}"
        "`budget.multiple=0` measures which multiples of channels the device computes fastest."
    ]


def _without_control(report: Report) -> list[str]:
    """A paragraph if the pruned network was trained longer than the one that it is compared with."""
    if report.control or not report.was_run("finetune"):
        return []
    return [
        "The pruned network was fine-tuned and the base was not, so part of the change may come from additional "
        "training, or from other images (see Stages). `finetune.control=True` fine-tunes the base in the same way."
    ]


def _budget(report: Report) -> str:
    budget = report.budget
    wanted = report.p * budget.before
    channel = budget.before / sum(report.widths_before)

    def amount(cost: float) -> str:
        return f"{cost:,.3f}" if budget.kind == "latency" else f"{cost / 1e6:,.3f} M"

    text = (
        f"Target: at most p = {report.p:.4f} of {amount(budget.before)} {budget.unit}, {amount(wanted)}. "
        f"Reached: p = {report.p_reached:.4f}, {amount(budget.after)}. "
    )
    if budget.kind == "latency":
        text += f"{_predicted_and_measured(report)} "
    if budget.predicted is not None:
        missed = abs(report.p_reached - report.p) > _MISSED
        return text + (f"**That is not the p = {report.p:.4f} that was wanted.**" if missed else "")
    if budget.after > wanted * (1 + 1e-6):
        return text + f"**The budget is exceeded by {amount(budget.after - wanted)}.**"
    unused = wanted - budget.after
    if unused > channel:
        return text + (
            f"**The budget is not fully used**: {amount(unused)} are left, "
            f"{unused / channel:.1f} times an average channel of the unpruned network."
        )
    return text + "The difference is less than one channel of average cost."


def _predicted_and_measured(report: Report) -> str:
    budget, latency = report.budget, report.latency_ms
    if budget.predicted is not None:
        return (
            "The pruned network was timed in turn with the unpruned one, before fine-tuning, and its widths were "
            f"corrected by that; the latency table alone predicted p = {budget.predicted / budget.before:.4f} for them."
        )
    return (
        "These are predictions: the times of single layers, scaled to those of the entire network at several widths "
        f"({tables.change(budget.before, budget.after)}); the entire network was measured at {latency.before:,.3f} ms "
        f"before and {latency.after:,.3f} ms after ({tables.change(latency.before, latency.after)}, batch "
        f"{latency.batch})."
    )


def _methodology(report: Report) -> list[str]:
    verification = report.verification
    agreement = 100 * verification.argmax_agreement
    return [
        f"Accuracies are those of the last epoch, over all {report.test_images:,} test images, each counted once.",
        f"The best checkpoint is selected on {_counted(report.held_out_images)}held-out training images{_best(report)} "
        "and is not what this report shows; test images were not used for any decision in this run.",
        f"Verification: the logits of the smaller and of the masked network differ by at most "
        f"{verification.max_difference:.1e}; {agreement:.2f} % of the predictions agree.",
        f"Batch-norm statistics in training: {report.batch_norm}. Precision: {report.precision}.",
        *_pixels(report),
    ]


def _counted(images: int | None) -> str:
    return "" if images is None else f"{images:,} "


def _best(report: Report) -> str:
    if report.best_pruned_validation_top1 is not None:
        return f" (it reached {report.best_pruned_validation_top1:.2f} % there in fine-tuning)"
    return " (its accuracy is lost: metrics.jsonl has no record of it)" if report.was_run("finetune") else ""


def _pixels(report: Report) -> list[str]:
    """The preprocessing of the images."""
    done = report.preprocessing
    if done is None:
        return []
    mean, std = (", ".join(f"{value:.4g}" for value in done[name]) for name in ("mean", "std"))
    return [
        f"Pixels are multiplied by {done['scale']:.4g} and normalized by the mean ({mean}) and the standard deviation "
        f"({std})."
    ]


def _search(report: Report, has_curve: bool) -> list[Block]:
    if not report.was_run("search"):
        return [Paragraph("This method has no search; it selects in one shot.")]
    converged = [Paragraph(note) for note in report.notes if note.startswith(_CONVERGED)]
    if not has_curve:
        lost = "The log of the search is lost: metrics.jsonl has no record of it, so there is no plot."
        return [*converged, Paragraph(lost)]
    return [*converged, _picture("search")]


def _picture(name: str) -> Picture:
    return Picture(name, CAPTIONS[name])


def _untrained(report: Report) -> list[str]:
    """Says so where the unpruned network is no better than guessing: one that is constant passes every other check."""
    classes = (report.preprocessing or {}).get("num_classes")
    if classes is None or report.base_top1 > _GUESSED * 100 / classes:
        return []
    return [
        f"**The unpruned network is no better than guessing**: it has {report.base_top1:.2f} % top-1, and guessing one "
        f"of {classes} classes has {100 / classes:.2f} %. It has not learned, or its weights or the normalization of "
        "its images are wrong, so the comparison shows nothing. What helps: another base.learning_rate, more "
        "base.epochs, or the right base.weights."
    ]


def _not_converged(report: Report) -> list[str]:
    """The note of a search that has not converged, with advice."""
    return [
        f"**{_NOT_CONVERGED}**{note.removeprefix(_NOT_CONVERGED)}"
        for note in report.notes
        if note.startswith(_NOT_CONVERGED)
    ]


def _notes(report: Report) -> list[Block]:
    """The notes that appear nowhere else."""
    notes = [note for note in report.notes if not note.startswith((_CONVERGED, _NOT_CONVERGED))]
    return [Bullets(notes)] if notes else []
