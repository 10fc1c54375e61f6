"""Speed and memory of the steps compared with PyTorch, and of loading photographs compared with plain loops.

    python -m experiments.benchmark [--network=resnet56] [--only=search,training,evaluation,data] [--batch_size=128] \
        [--precision=float32] [--rounds=10] [--data_dir=DIR] [--json=PATH]

`experiments.steps` defines the steps, on synthetic images, and `experiments.loading` what is loaded; its seconds are
CPU time, summed over all threads of the process.

Everything measured runs in a separate process (`experiments.interleaved`), started with the flags that
`experiments.launch` gives a run. A round is one step on CPU and ten elsewhere, where they are one dispatch. Images/s
come from the median round, ratios are medians of each round's ratio, and peak memory is the maximum resident set of the
process (interpreter, libraries and compiler included), on a GPU the most bytes in use on the device.

PyTorch is left out where it is not installed. On a machine with several GPUs set CUDA_VISIBLE_DEVICES to one, because
PyTorch uses one. Runs on GPUs by design, but was measured on CPU only.
"""

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments import launch, loading, steps
from experiments.interleaved import Measurement, interleave, ratio
from experiments.steps import NETWORKS, OURS, PRECISIONS

DATA = "data"
STAGES = (*OURS, DATA)
PYTORCH = "PyTorch"


def measure(
    stage: str, flags: argparse.Namespace, with_pytorch: bool
) -> tuple[dict[str, Measurement], dict[str, dict[str, str]]]:
    """Measures a stage.

    Returns:
      By name, and for `PYTORCH` if it takes part: the measurement, and what the process says of itself.
    """
    network = NETWORKS[flags.network]._replace(batch_size=flags.batch_size)
    if stage == DATA:
        names = [n for n in (loading.OURS, *loading.LOOPS) if flags.data_dir or n != loading.READING]
        candidates = {name: (loading.candidate, name, flags.data_dir, flags.batch_size) for name in names}
    else:
        candidates = {row: (steps.ours, stage, form, network, flags.precision) for row, form in OURS[stage].items()}

    def others(platform: str) -> dict[str, tuple[Any, ...]]:
        compared = with_pytorch and stage != DATA and platform in ("cpu", "gpu")
        return {PYTORCH: (steps.pytorch, stage, flags.network, network, flags.precision, platform)} if compared else {}

    return interleave(candidates, flags.rounds, stage, others)


def summarize(measured: Mapping[str, Measurement], batch_size: int) -> dict[str, dict[str, float]]:
    """The figures of a stage, per name: `images_per_s`, `peak_bytes`, and the ratio to every other by its name."""
    return {
        name: {
            "images_per_s": batch_size / median(own.seconds),
            "peak_bytes": own.peak_bytes,
            "time_over": {o: ratio(own.seconds, other.seconds) for o, other in measured.items() if o != name},
        }
        for name, own in measured.items()
    }


def table(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figures (stage -> `summarize`) as Markdown tables, and a sentence for what they do not hold."""
    of_steps = {stage: figures for stage, figures in stages.items() if stage != DATA}
    parts = [_steps_table(of_steps)] if of_steps else []
    if DATA in stages:
        parts.append(_data_table(stages[DATA]))
    if "search" in stages:
        generators, scalars = OURS["search"]
        over = stages["search"][generators]["time_over"][scalars]
        parts.append(f"A search step with generators takes {over:.3f} of the time of one with scalars.")
    if not all(PYTORCH in figures for figures in of_steps.values()):
        parts.append("PyTorch is not installed or cannot use this device, so there is nothing to compare with.")
    return "\n\n".join(parts)


def _steps_table(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [
        "| step | images/s | peak MiB | PyTorch images/s | PyTorch peak MiB | time / PyTorch's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for figures in stages.values():
        other = figures.get(PYTORCH)
        for name, own in figures.items():
            if name != PYTORCH:
                over = f"{own['time_over'][PYTORCH]:.2f}" if other else "-"
                cells = [name, *_speed_and_memory(own), *_speed_and_memory(other), over]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _data_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    reference = loading.READING if loading.READING in figures else loading.REFERENCE
    lines = [f"| photographs | images/s per core | peak MiB | speed / {reference}'s |", "|---|--:|--:|--:|"]
    time_over = figures[reference]["time_over"]
    for name, own in figures.items():
        speed = f"{time_over[name]:.2f}" if name != reference else "1.00"
        lines.append(f"| {' | '.join([name, *_speed_and_memory(own), speed])} |")
    return "\n".join(lines)


def _speed_and_memory(figures: Mapping[str, Any] | None) -> tuple[str, str]:
    if not figures:
        return "-", "-"
    speed = figures["images_per_s"]
    return f"{speed:.{0 if speed >= 100 else 1}f}", f"{figures['peak_bytes'] / 2**20:.0f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `only` becomes a list of stages.

    Raises:
      ValueError: Names the flag.
      SystemExit: A flag is unknown, or its value of another type.
    """
    parser = launch.Parser(prog="python -m experiments.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(STAGES), help="stages to measure, separated by commas")
    parser.add_argument("--network", default="resnet56", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--precision", default=PRECISIONS[0], help=f"one of {', '.join(PRECISIONS)}")
    parser.add_argument("--batch_size", type=int, help="images per step; by default 128 of CIFAR's size, else 16")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each process")
    parser.add_argument("--data_dir", default="", help="prepared imagenet2012; without it photographs are synthetic")
    parser.add_argument("--json", type=Path, help="also write every figure, and the seconds of each round, there")
    flags = parser.parse_args(arguments)
    flags.only = flags.only.split(",")
    for stage in flags.only:
        if stage not in STAGES:
            raise ValueError(f"--only={stage!r} is unknown; use {', '.join(STAGES)}, separated by commas.")
    steps.check_flags(flags, {"precision": PRECISIONS}, counts=("rounds",))
    if flags.json and not flags.json.parent.is_dir():
        raise ValueError(f"--json={flags.json}: there is no folder {flags.json.parent}; make it first.")
    if flags.json and flags.json.is_dir():
        raise ValueError(f"--json={flags.json} is a folder; give a file in it.")
    return flags


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    try:
        flags = parse()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    with_pytorch = importlib.util.find_spec("torch") is not None
    stages, details = {}, {}
    for stage in flags.only:
        measured, about = measure(stage, flags, with_pytorch)
        stages[stage] = summarize(measured, flags.batch_size)
        details[stage] = {
            name: {**stages[stage][name], "seconds": measured[name].seconds, **about[name]} for name in measured
        }
    candidates = {
        f"{candidate['version']} on {candidate['device']}": None
        for stage in details.values()
        for candidate in stage.values()
    }
    what = f"{flags.network}, {flags.precision}, batch {flags.batch_size}, {flags.rounds} rounds"
    print(f"{what}; {'; '.join(candidates)}.\n\n{table(stages)}")
    if flags.json:
        measured_on = {name: getattr(flags, name) for name in ("network", "precision", "batch_size")}
        content = {**measured_on, "rounds": flags.rounds, "stages": details}
        flags.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
