"""The main job: base weights, search, cut, fine-tuning and report, each stage resumable from the workdir."""

from ddnp_jax import extras

with extras.needed_by("ddnp_jax.pipeline"):
    from ddnp_jax.pipeline.job import Run, prepare, run
    from ddnp_jax.pipeline.results import summarize
    from ddnp_jax.pipeline.stages import base, control, cut, finetune, search, search_curves
    from ddnp_jax.pipeline.workdir import locked

__all__ = [
    "Run",
    "base",
    "control",
    "cut",
    "finetune",
    "locked",
    "prepare",
    "run",
    "search",
    "search_curves",
    "summarize",
]
