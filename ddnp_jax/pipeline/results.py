"""What a run has measured after each stage, `results.json`, and what its report says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ddnp_jax import files, parallel
from ddnp_jax.config import STAGES, Stage
from ddnp_jax.cost import flops
from ddnp_jax.topology import Selection
from ddnp_jax.training import loop

if TYPE_CHECKING:
    from ddnp_jax.pipeline.job import Run

# What `results.json` holds of a stage and of what is made of it before the next.
_OF_STAGE = {
    "base": ("base",),
    "search": ("proposed_p", "search_notes", "verification", "unfinetuned"),
    "finetune": ("pruned", "latency_ms"),
}


class Results:
    """`results.json`: what was measured after each stage, so that a resumed run does not measure it again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Any]:
        """All results so far, by name."""
        return files.read_json(self._path) if self._path.exists() else {}

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of that name; it is measured and kept where there is none yet. Every process must call."""
        results = self.read()
        if parallel.any_process(name not in results):  # all processes measure, or none
            results[name] = measure()
            parallel.on_first_process(lambda: files.write_json(self._path, results))
        return results[name]

    def forget(self, stage: Stage) -> None:
        """Drops the results of a stage that takes steps, perhaps again, and of those after it."""
        stale = {name for later in STAGES[STAGES.index(stage) :] for name in _OF_STAGE[later]}
        kept = {name: value for name, value in self.read().items() if name not in stale}
        parallel.on_first_process(lambda: files.write_json(self._path, kept))


def summarize(job: "Run", selection: Selection) -> dict[str, Any]:
    """Everything that the report says, as one flat dictionary."""
    config, topology, results = job.config, job.topology, job.results.read()
    convention, budget = config.budget.convention, job.budget
    return {
        "method": config.search.method,
        "variant": config.variant,
        "model": job.name,
        "dataset": job.dataset.name,
        "seed": config.seed,
        "p": budget.p,
        "budget": {
            "kind": config.budget.kind,
            "unit": budget.counted.unit,
            "before": budget.total,
            "after": budget.cost(selection.widths),
        },
        "flops_convention": convention,
        **{f"{stage}_{k}": results[stage][k] for stage in ("base", "unfinetuned", "pruned") for k in ("top1", "top5")},
        "best_pruned_validation_top1": job.log.best("finetune"),
        "test_images": len(job.dataset.test),
        "flops_total_before": flops.total(topology, None, convention),
        "flops_total_after": flops.total(topology, selection.widths, convention),
        "flops_prunable_before": flops.prunable(topology, None, convention),
        "flops_prunable_after": flops.prunable(topology, selection.widths, convention),
        "params_before": flops.parameters(topology),
        "params_after": flops.parameters(topology, selection.widths),
        "gate_names": [gate.name for gate in topology.gates],
        "widths_before": list(topology.widths),
        "widths": list(selection.widths),
        "seconds": {stage: loop.seconds(job.workdir / stage) for stage in STAGES},
        "epochs": {stage: config.stage(stage).epochs for stage in STAGES},
        "batch_norm": "synced" if config.parallel.sync_batch_norm else "per device",
        "precision": np.dtype(getattr(job.network.model, "dtype", None) or np.float32).name,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "latency_ms": results["latency_ms"],
        "verification": results["verification"],
        "notes": [*config.notes, *job.dataset.notes, *results["search_notes"], *_fitted(job, results["proposed_p"])],
    }


def _fitted(job: "Run", proposed: float | None) -> list[str]:
    """Says so where the search's own widths miss the budget by more than the rounding of one channel."""
    channel = job.budget.total / sum(job.topology.widths)
    if proposed is None or abs(proposed - job.budget.p) * job.budget.total <= channel:
        return []
    return [
        f"The search ended at {proposed:.4f} of the {job.budget.counted.unit}; its widths were fitted to the budget."
    ]
