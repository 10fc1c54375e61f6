"""`results.json`, the results of a run after each stage, and their summary for the report."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax.traverse_util import flatten_dict

from ddnp_jax import files, parallel
from ddnp_jax.config import STAGES, Config, Stage, TrainerConfig
from ddnp_jax.cost import flops, multiples
from ddnp_jax.fields import built, listed
from ddnp_jax.methods import AdamW
from ddnp_jax.pipeline import exporting
from ddnp_jax.pipeline.report import Cost, Export, Latency, PerStage, Report, Training, Verification
from ddnp_jax.topology import Selection
from ddnp_jax.training import loop

if TYPE_CHECKING:
    from ddnp_jax.pipeline.job import Run


class Results:
    """`results.json`: what was measured after each stage, so that a resumed run does not measure it again.

    Each result is kept with what it was made from, and taken for that alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def values(self) -> dict[str, Any]:
        """All results so far, by name.

        Raises:
          ValueError: The file is damaged.
        """
        return {name: entry["value"] for name, entry in self._read().items()}

    def measured(
        self, name: str, made_from: str, measure: Callable[[], Any], still_holds: Callable[[Any], bool] = lambda _: True
    ) -> Any:
        """A result; it is measured and kept where there is none of what it is made from. Every process must call.

        Args:
          name: Name of the result.
          made_from: What it is made from, as `identity.made_from` returns it.
          measure: Measures it: a JSON value. That of the first process is kept.
          still_holds: Whether one that is kept is still true, of files for example.

        Raises:
          ValueError: The file is damaged.
        """
        results = self._read()
        found = results.get(name, {})
        is_stale = found.get("made_from") != made_from or not still_holds(found["value"])
        if parallel.any_process(is_stale):  # all processes measure, or none
            results[name] = {"made_from": made_from, "value": measure()}
            parallel.on_first_process(lambda: files.write_sealed(self._path, results))
            results = self._read()  # all processes take what the first one measured
        return results[name]["value"]

    def _read(self) -> dict[str, Any]:
        return files.read_sealed(self._path) if self._path.exists() else {}


def summarize(job: "Run", selection: Selection) -> Report:
    """What the run has shown."""
    config, topology, results = job.config, job.topology, job.results.values()
    convention, widths = config.budget.convention, selection.widths
    control = results["control"] if config.finetune.control else {}
    training = _training(job, results["search_steps"])
    exports = {form: results[f"export_{form}"] for form in listed(config.export) if f"export_{form}" in results}
    return Report(
        method=config.search.method,
        variant=config.variant,
        settings=_settings(job),
        model=job.name,
        dataset=job.dataset.name,
        preprocessing=job.dataset.serving(),
        seed=config.seed,
        p=job.budget.p,
        budget=_cost(job, selection, results["latency_correction"]),
        flops_convention=convention,
        base_top1=results["base"]["top1"],
        base_top5=results["base"]["top5"],
        control_top1=control.get("top1"),
        control_top5=control.get("top5"),
        unfinetuned_top1=results["unfinetuned"]["top1"],
        unfinetuned_top5=results["unfinetuned"]["top5"],
        pruned_top1=results["pruned"]["top1"],
        pruned_top5=results["pruned"]["top5"],
        best_pruned_validation_top1=job.log.best("finetune"),
        held_out_images=len(job.dataset.splits["validation"]),
        test_images=len(job.dataset.test),
        flops_total_before=flops.total(topology, None, convention),
        flops_total_after=flops.total(topology, widths, convention),
        flops_prunable_before=flops.prunable(topology, None, convention),
        flops_prunable_after=flops.prunable(topology, widths, convention),
        params_before=flops.parameters(topology),
        params_after=flops.parameters(topology, widths),
        gate_names=tuple(gate.name for gate in topology.gates),
        widths_before=topology.widths,
        widths=widths,
        seconds=PerStage(**{s: loop.seconds(job.workdir / s) if s in training else 0.0 for s in STAGES}),
        epochs=PerStage(**{stage: config.stage(stage).epochs for stage in STAGES}),
        training=training,
        batch_norm="synced" if config.parallel.sync_batch_norm else "per device",
        precision=np.dtype(getattr(job.network.model, "dtype", None) or np.float32).name,
        devices=results["devices"],
        latency_ms=Latency(**results["latency_ms"]),
        latency_devices=parallel.description(),
        other_latencies=tuple(_other_latencies(config, results)),
        verification=Verification(**results["verification"]),
        exports={form: built(Export, found) for form, found in exports.items()},
        notes=(
            *config.notes,
            *job.dataset.notes,
            *_fastest_multiple(job),
            *results["search_notes"],
            *_fitted(job, results["proposed_p"]),
            *_recalibrated(config.finetune.recalibration_steps, config.finetune.step_batch),
        ),
    )


def _settings(job: "Run") -> dict[str, Any]:
    """The configuration by section and field, without what may change when the run resumes."""
    sections = {name: value for name, value in job.identity.items() if name != "given"}
    return flatten_dict(sections, sep=".")


def _other_latencies(config: Config, results: Mapping[str, Any]) -> Iterator[Latency]:
    """Times of single images, and those of other runtimes."""
    if results["latency_ms"]["batch"] > 1:
        yield Latency(**results["latency_ms_of_one"])
    for form in exporting.timed(config):
        yield from (Latency(**times) for times in results.get(f"latencies_in_{form}", ()))


def _cost(job: "Run", selection: Selection, correction: Mapping[str, float] | None) -> Cost:
    """The cost before and after; of a latency budget the measured one, where this machine's latency counts."""
    budget = job.budget
    cost = Cost(
        kind=job.config.budget.kind,
        unit=budget.counted.unit,
        before=budget.total,
        after=budget.cost(selection.widths),
    )
    if correction is None:
        return cost
    return dataclasses.replace(cost, after=correction["measured"] * cost.before, predicted=cost.after)


def _training(job: "Run", search_steps: int) -> dict[str, Training]:
    """What every stage that takes steps learns from."""
    config = job.config
    steps = {stage: job.stage_steps(stage)[0] for stage in STAGES}
    steps["search"] = search_steps
    if job.weights is not None:
        steps["base"] = 0
    if not config.finetune.control:
        steps["control"] = 0
    return {
        stage: Training(
            images=len(job.stage_images(stage)),
            steps=steps[stage],
            batch_size=config.stage(stage).batch_size,
            learning_rates=_learning_rates(config, stage),
        )
        for stage in STAGES
        if steps[stage]
    }


def _learning_rates(config: Config, stage: Stage) -> dict[str, float]:
    section = config.stage(stage)
    if isinstance(section, TrainerConfig):
        return {"sgd": section.learning_rate}
    fields = vars(section.method_fields())
    return {name: value.learning_rate for name, value in fields.items() if isinstance(value, AdamW)}


def _recalibrated(steps: int, batch_size: int) -> list[str]:
    if not steps:
        return []
    return [
        f"The batch statistics of the pruned network were re-estimated over {steps} batches of {batch_size} images "
        "before it was measured and fine-tuned."
    ]


def _fastest_multiple(job: "Run") -> list[str]:
    """Says which multiple of channels was chosen, if that was left to the device."""
    if job.config.budget.multiple:
        return []
    return [multiples.load(job.workdir / multiples.FILE).describe(job.budget.multiple)]


def _fitted(job: "Run", proposed: float | None) -> list[str]:
    """Says so where the search's own widths miss the budget by more than the rounding of one channel."""
    channel = job.budget.total / sum(job.topology.widths)
    if proposed is None or abs(proposed - job.budget.p) * job.budget.total <= channel:
        return []
    return [
        f"The search ended at {proposed:.4f} of the {job.budget.counted.unit}; its widths were fitted to the budget."
    ]
