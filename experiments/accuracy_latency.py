"""Accuracy against measured latency of the networks of finished runs, which are timed again, in turn.

    python -m experiments.accuracy_latency --workdir=results/accuracy_latency [--batch=1] [--runtime=onnx] RUN...

The latencies that reports give depend on the load of the machine during each run. Here all networks of a kind are timed
in one interleaved measurement. Time does not depend on the weights, so a run needs only its `report.json`.
`accuracy_latency.md` has the table, and `accuracy_latency.png` a plot for each network and data set.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from matplotlib.figure import Figure

import ddnp_jax
from ddnp_jax import files
from ddnp_jax.cost.network_times import ONNX, RUNTIMES, XLA
from ddnp_jax.pipeline import report
from ddnp_jax.pipeline.report import Report, pareto
from ddnp_jax.pipeline.report.compare import lines_of, tasks_of
from experiments import launch, steps
from experiments.latency import timer_of

NETWORKS = {
    **steps.NETWORKS,
    "efficientnet_lite0": steps.Network("imagenet_efficientnet_lite0", (224, 224, 3), 16),
}


def timed(runs: Sequence[Report], batch: int, runtime: str) -> list[Report]:
    """Returns the reports of one network with latencies that are measured now.

    Raises:
      ValueError: The runs have a network that cannot be built here.
    """
    name = runs[0].model
    if name not in NETWORKS:
        raise ValueError(f"{runs[0].title}: the model is unknown here; use runs of {', '.join(NETWORKS)}.")
    timer = timer_of(NETWORKS[name], batch, runtime)
    for run in runs:
        if tuple(run.gate_names) != tuple(gate.name for gate in timer.topology.gates):
            raise ValueError(f"{run.title}: its gates are not those of {name}; use runs without residual pruning.")
    whole = tuple(timer.topology.widths)
    distinct = list(dict.fromkeys([whole, *(tuple(run.widths) for run in runs)]))
    ms = dict(zip(distinct, timer.ms(distinct), strict=True))
    return [
        dataclasses.replace(
            run, latency_ms=report.Latency(batch=batch, before=ms[whole], after=ms[tuple(run.widths)], runtime=runtime)
        )
        for run in runs
    ]


def about(runs: Sequence[Report]) -> str:
    """What all runs of a plot have in common."""
    removed = sorted({round(run.flops_reduction) for run in runs})
    epochs = sorted({run.epochs.finetune for run in runs})
    tuning = f"{_range(epochs)} epoch{'s' * (epochs[-1] != 1)} of fine-tuning" if epochs[-1] else "before fine-tuning"
    return f"{runs[0].model} on {runs[0].dataset}\n{_range(removed)} % fewer FLOPs, {tuning}"


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{each:g}" for each in (values[0], values[-1])))


def table(runs: Iterable[Report]) -> str:
    """The measurements as a Markdown table."""
    rows = [
        [
            run.model,
            run.method_name,
            f"{run.seed}",
            f"{run.base_top1:.2f}",
            f"{run.pruned_top1:.2f}",
            f"{100 - run.flops_reduction:.1f}",
            f"{pareto.latency_kept(run):.1f}",
            f"{run.latency_ms.after:.2f}",
        ]
        for run in runs
    ]
    header = ["network", "method", "seed", "base top-1 (%)", "top-1 (%)", "FLOPs kept (%)", "latency kept (%)", "ms"]
    return report.table(header, rows, text_columns=2)


def figure(panels: Sequence[Sequence[Report]], where: str) -> Figure:
    """Accuracy against latency, a plot for each network."""
    drawn = Figure(figsize=(5.0 * len(panels), 4.2), layout="constrained")
    styles = pareto.styles(run.method_name for runs in panels for run in runs)
    for place, runs in enumerate(panels):
        axes = report.plain_axes(drawn, 1, len(panels), place)
        pareto.draw(axes, lines_of(runs), styles, pareto.latency_kept, f"latency kept (%), {where}")
        axes.set_title(about(runs), fontsize=10)
    pareto.add_legend(drawn)
    return drawn


def main() -> None:
    """Times the networks of the runs that the command line names."""
    parser = launch.Parser(prog="python -m experiments.accuracy_latency", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its report.json")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the table and the plot")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--runtime", choices=RUNTIMES, default=ONNX, help="what computes the networks")
    given = parser.parse_args()
    if given.batch < 1:
        parser.error(f"--batch={given.batch} must be at least 1.")
    ddnp_jax.configure_cpu()
    reports = [report.read(path / "report.json" if path.is_dir() else path) for path in given.runs]
    panels = [timed(runs, given.batch, given.runtime) for runs in tasks_of(reports)]
    images = "one image" if given.batch == 1 else f"{given.batch} images"
    where = f"{images} in {'ONNX Runtime' if given.runtime == ONNX else f'XLA (JAX {jax.__version__})'}"
    given.workdir.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind if given.runtime == XLA else "cpu"
    text = f"Latency of {where} on {device}; all networks of a kind in turn.\n\n{table(itertools.chain(*panels))}\n"
    files.write_text(given.workdir / "accuracy_latency.md", text)
    report.write_figure(given.workdir / "accuracy_latency.png", figure(panels, where))
    print(f"table: {given.workdir}/accuracy_latency.md")


if __name__ == "__main__":
    main()
