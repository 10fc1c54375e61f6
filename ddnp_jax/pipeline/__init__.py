"""The main job: base weights, search, compaction, fine-tuning and report, each stage resumable from the workdir."""

from ddnp_jax.pipeline.job import Run, base, cut, finetune, prepare, run, search, search_curves, summarize

__all__ = ["Run", "base", "cut", "finetune", "prepare", "run", "search", "search_curves", "summarize"]
