"""One table over several runs."""

from collections.abc import Sequence
from typing import Any

from ddnp_jax.config import STAGES
from ddnp_jax.pipeline.report.markdown import table
from ddnp_jax.pipeline.report.schema import Report
from ddnp_jax.pipeline.report.tables import mean

_HEADER = (
    *("method", "model", "data set", "p", "FLOPs as", "fine-tuning epochs", "seeds"),
    *("FLOPs removed (%)", "parameters removed (%)", "base top-1 (%)", "before fine-tuning", "after fine-tuning"),
    *("change", "base, fine-tuned in the same way", "change to that", "seconds"),
)
_FOOT = (
    "Several seeds: mean ± sample standard deviation. Accuracies: test set, last epoch. Change: from the base to after "
    "fine-tuning. Seconds: base training, search and fine-tuning."
)


def compare(reports: Sequence[Report]) -> str:
    """One table over several runs, the runs that differ in the seed alone in one line.

    Args:
      reports: Results of the runs.

    Returns:
      Markdown; several seeds as mean ± sample standard deviation.

    Raises:
      ValueError: Two runs of one line have the same seed.
    """
    groups: dict[tuple[Any, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault(_all_but_the_seed(report), []).append(report)
    return f"{table(_HEADER, [_row(runs) for runs in groups.values()], text_columns=3)}\n\n{_FOOT}\n"


def _all_but_the_seed(report: Report) -> tuple[Any, ...]:
    epochs = (report.epochs.of(stage) if report.was_run(stage) else None for stage in STAGES if stage != "control")
    return report.method_name, report.model, report.dataset, report.p_name, report.flops_convention, *epochs


def _row(runs: Sequence[Report]) -> list[str]:
    """The line of runs that differ in the seed alone."""
    first, seeds = runs[0], [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ValueError(
            f"Two reports of {first.method_name} on {first.model} with p={first.p_name} have seed {twice}; give each "
            "run once, and runs that differ in more than the seed different values of config.variant."
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
