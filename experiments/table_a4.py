"""Table A4 of the DDNP paper in one command: several methods with the same budget and the same fine-tuning.

    python -m experiments.table_a4 --config=configs/imagenet_r50.py:62 --workdir=runs/table_a4 --seeds=3

A row is given by the words that it adds to the argument of --config: `--row=hrank --row=chip,chip_rates
--row=lamp,residual`; without `--row`, the table has all methods. `--config.search.FIELD=VALUE` sets a field in the rows
whose method has it; if it is not a field of DDNP, name its method too: `--config=FILE.py:62,nppm`.

The base network is trained (or loaded) once, and every row is a separate run of the pipeline in `workdir/ROW/SEED`. The
same command resumes an unfinished table, and a command that names more rows or seeds extends it. Every row removes the
same fraction of all FLOPs, which --config sets, even if rows can prune different channels. `table.md` and `table.json`
have the rows that the command names, as far as they are finished, and are written after every run. With
`finetune.control`, the base network is fine-tuned too, once for all rows. A finished run needs only its `config.json`
and `report.json` to stay in the table, and `latency.json` or `multiple.json` where its budget is measured; its weights
may be deleted.
"""

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from ddnp_jax import data, files, parallel, pipeline
from ddnp_jax.config import Config, FinetuneConfig, SearchConfig, as_dict, typed
from ddnp_jax.cost import flops
from ddnp_jax.fields import listed
from ddnp_jax.pipeline import report
from ddnp_jax.pipeline.report import Report
from ddnp_jax.topology import trace
from experiments import launch
from experiments.shared import SEEDS, shared_base

METHODS = ("uniform", "magnitude", "bn_scale", "fpgm", "lamp", "taylor", "hrank", "chip", "cc", "ddnp", "nppm")
ROWS = flags.DEFINE_multi_string("row", list(METHODS), "A row: arguments for the configuration; may be repeated.")


class Published(NamedTuple):
    """A row of a paper's table, in percent."""

    base_top1: float
    top1: float
    top5: float
    flops_reduction: float

    @property
    def delta_top1(self) -> float:
        """Top-1 accuracy compared with the base, in points."""
        return self.top1 - self.base_top1

    def to_json(self) -> dict[str, float]:
        """Returns the row as JSON values."""
        return {**self._asdict(), "delta_top1": round(self.delta_top1, 2)}


# Table A4 of the DDNP paper. Each method was fine-tuned with its own recipe: HRank's channels, fine-tuned for 90 epochs
# with a cosine and label smoothing, reach 75.83 and 92.85 % at CHIP's size ("HRankPlus").
PUBLISHED = {
    ("resnet50", "imagenet2012"): {
        "hrank": Published(76.15, 71.98, 91.01, 62.1),
        "cc": Published(76.15, 74.54, 92.25, 62.7),
        "chip": Published(76.15, 75.26, 92.53, 62.8),
        "ddnp": Published(76.13, 75.56, 92.68, 62.0),
    }
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      name: The words that the row adds to the argument of the configuration.
      runs: The runs of the row, which differ only in the seed.
      published: The paper's row for this method, network and data set; None if there is none.
    """

    name: str
    runs: tuple[Report, ...]
    published: Published | None

    def to_json(self) -> dict[str, Any]:
        """Returns the results of every seed, their means and deviations, and those of the paper, as JSON values."""
        figures = {name: _spread([of(run) for run in self.runs]) for name, of in FIGURES.items()}
        published = None if self.published is None else self.published.to_json()
        return {"row": self.name, "seeds": [run.seed for run in self.runs], **figures, "published": published}


FIGURES: dict[str, Callable[[Report], float]] = {
    "FLOPs removed (%)": lambda run: run.flops_reduction,
    "parameters removed (%)": lambda run: run.params_reduction,
    "latency (% of base)": lambda run: 100 * run.latency_ms.after / run.latency_ms.before,
    "top-1 before fine-tuning": lambda run: run.unfinetuned_top1,
    "top-1 after": lambda run: run.pruned_top1,
    "top-5 after": lambda run: run.pruned_top5,
    "Δ top-1": lambda run: run.delta_top1,
}


def make(config: ConfigDict, workdir: str) -> str:
    """Runs, or resumes, every row with every seed; returns the last line of output."""
    folder = Path(workdir).absolute()
    names = list(dict.fromkeys(ROWS.value))
    configs = {name: launch.with_arguments(name) for name in names}
    _check_set_fields(configs)
    with pipeline.locked(folder):
        job, weights = shared_base(_base_config(config, configs.values()), folder / "base")
        published = {name: _published(name, job) for name in names}
        rows = {name: _row_config(configs[name], config, job, weights) for name in names}
        runs: dict[tuple[int, str], tuple[ConfigDict, Path]] = {}
        for seed in range(SEEDS.value):
            for name, row in rows.items():
                own = ConfigDict(row.copy_and_resolve_references())
                own.seed, own.finetune.control = seed, config.finetune.control and name == names[0]
                runs[seed, name] = own, folder / re.sub(r"\W+", "-", name) / str(seed)
        finished = {key: found for key, run in runs.items() if (found := _finished(*run))}
        parallel.on_first_process(lambda: _write(folder, config, _rows(finished, published)))
        for key in [key for key in runs if key not in finished]:
            pipeline.run(*runs[key])
            finished[key] = report.read(runs[key][1] / "report.json")
            jax.clear_caches()  # other rows do not need the compiled programs of this row's network
            parallel.on_first_process(lambda: _write(folder, config, _rows(finished, published)))
    return f"table: {folder}/table.md"


def _rows(finished: Mapping[tuple[int, str], Report], published: Mapping[str, Published | None]) -> list[Row]:
    """The rows of the table so far, in the order of `published`, each with the seeds that are finished."""
    runs = {name: tuple(finished[key] for key in sorted(finished) if key[1] == name) for name in published}
    return [Row(name, found, published[name]) for name, found in runs.items() if found]


def _check_set_fields(configs: Mapping[str, ConfigDict]) -> None:
    """Raises for a field on the command line that no row has: it would change nothing."""
    for name in launch.set_fields():
        if not any(launch.has_field(config, name) for config in configs.values()):
            raise ValueError(f"--config.{name} is not a field of any row; the rows are {', '.join(configs)}.")


def _base_config(config: ConfigDict, rows: Iterable[ConfigDict]) -> ConfigDict:
    """Returns the configuration of the base network, whatever the method of --config and its fields are.

    The base network is not trained on the search images of any row.
    """
    base = ConfigDict(config.copy_and_resolve_references())
    base.variant = "base"
    with base.unlocked():
        search = SearchConfig.of("uniform", batch_size=config.search.batch_size)
        base.search = as_dict(typed(Config(search=search)))["search"]
    if not config.base.weights:
        base.data.search_fraction = max(row.data.search_fraction for row in (config, *rows))
    return base


def _published(name: str, job: pipeline.Run) -> Published | None:
    """Returns the paper's row for a row of the table: the same method in its own form, at the table's budget.

    The paper compares its methods at DDNP's budget; the others removed up to 0.8 points more.
    """
    method, *words = name.split(",")
    rows = PUBLISHED.get((job.config.model.name, job.config.data.name), {})
    if method not in rows or set(words) - {f"{method}_rates"}:
        return None
    reduction = 100 * flops.reduction_for_p(job.topology, job.config.budget.p, job.config.budget.convention)
    return rows[method] if abs(reduction - rows["ddnp"].flops_reduction) < 1 else None


def _finished(config: ConfigDict, workdir: Path) -> Report | None:
    """The report of a finished run; None for others, and if more is asked of it now: a control, an export."""
    path = workdir / "report.json"
    if not (path.exists() and (workdir / "config.json").exists()):
        return None
    pipeline.prepare(config, workdir)  # raises if the report is that of another configuration
    found = report.read(path)
    is_complete = set(listed(config.export)) <= set(found.exports) and (found.control or not config.finetune.control)
    return found if is_complete else None


def _row_config(row: ConfigDict, config: ConfigDict, job: pipeline.Run, weights: Path) -> ConfigDict:
    """Returns the configuration of a row, with the budget and the base network of the table."""
    own = ConfigDict(row.copy_and_resolve_references())
    own.base.weights = str(weights)
    own.budget.p = config.budget.p
    if config.budget.kind == "flops":
        convention = config.budget.convention
        reduction = flops.reduction_for_p(job.topology, config.budget.p, convention)
        topology = trace(job.network.model, job.dataset.image_shape, residual=own.budget.residual)
        own.budget.p = flops.p_for_reduction(topology, reduction, convention)
    return own


def _write(folder: Path, config: ConfigDict, rows: Sequence[Row]) -> None:
    if not rows:
        return
    files.write_json(folder / "table.json", to_json(config, rows))
    files.write_text(folder / "table.md", markdown(config, rows))


def to_json(config: ConfigDict, rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the table as JSON values: the base network, the recipe of fine-tuning, and the rows."""
    first = rows[0].runs[0]
    base = {
        "top-1": first.base_top1,
        "top-5": first.base_top5,
        "test images": first.test_images,
        "FLOPs": first.flops_total_before,
        "parameters": first.params_before,
        "top-1 fine-tuned in the same way": _spread(_controls(rows)),
    }
    return {
        "base": base,
        "finetune": dataclasses.asdict(typed(config).finetune),
        "rows": [row.to_json() for row in rows],
    }


def _controls(rows: Sequence[Row]) -> list[float]:
    """Accuracy of the fine-tuned base network, one for each seed, whichever rows have it."""
    found = {run.seed: run.control_top1 for row in rows for run in row.runs if run.control_top1 is not None}
    return list(found.values())


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Values over seeds, their mean and their sample standard deviation; None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "deviation": deviation}


def markdown(config: ConfigDict, rows: Sequence[Row]) -> str:
    """Returns the table, with notes on the base network and the fine-tuning that all rows share."""
    first, recipe = rows[0].runs[0], typed(config).finetune
    controls = _controls(rows)
    has_published = any(row.published for row in rows)
    header = ["row", "seeds", *FIGURES, *(("published top-1", "top-5", "Δ top-1", "FLOPs") if has_published else ())]
    lines = [
        f"# {config.model.name} on {data.label(typed(config).data)}: methods at one budget",
        "",
        report.table(header, [_cells(row, has_published) for row in rows]),
        "",
        f"Base: {first.base_top1:.2f} % top-1, {first.base_top5:.2f} % top-5 of {first.test_images:,} test images, "
        f"{first.flops_total_before / 1e6:,.2f} M multiply-accumulates, {first.params_before:,} parameters."
        + (f" Fine-tuned in the same way: {report.mean(controls)} %." if controls else ""),
        _recipe(recipe, first),
        "Several seeds: mean ± sample standard deviation. Δ: to the base. Latency: of a batch of "
        f"{first.latency_ms.batch}, base and pruned network interleaved, on {first.latency_devices or first.devices}.",
    ]
    if has_published:
        lines.append(
            "Published: Table A4 of the DDNP paper, where every method has its own recipe of fine-tuning. HRank's "
            "channels with a longer one (HRankPlus) reach 75.83 % top-1 at CHIP's size."
        )
    return "\n".join([*lines, ""])


def _recipe(recipe: FinetuneConfig, first: Report) -> str:
    if not recipe.epochs:
        return "No row is fine-tuned."
    units = "epoch" if recipe.epochs == 1 else "epochs"
    return (
        f"Fine-tuning of every row: {recipe.epochs} {units} of {first.training['finetune'].images:,} images, batch "
        f"{recipe.batch_size}, SGD with momentum {recipe.momentum:g}, learning rate {recipe.learning_rate:g} "
        f"({recipe.schedule}, {recipe.warmup_epochs:g} epochs of warm-up), weight decay {recipe.weight_decay:g}; the "
        "last epoch counts."
    )


def _cells(row: Row, has_published: bool) -> list[str]:
    cells = [row.name, str(len(row.runs)), *(report.mean([of(run) for run in row.runs]) for of in FIGURES.values())]
    if has_published and row.published is None:
        cells += ["-"] * 4
    elif row.published is not None:
        of = row.published
        cells += [f"{of.top1:.2f}", f"{of.top5:.2f}", f"{of.delta_top1:+.2f}", f"{of.flops_reduction:.1f}"]
    return cells


if __name__ == "__main__":
    launch.run("configs/imagenet_r50.py:62", make)
