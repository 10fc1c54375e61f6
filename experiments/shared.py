"""Shared by commands of several runs: seeds and the base network."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ddnp_jax import parallel, pipeline
from ddnp_jax.saved import DESCRIPTION, save_pruned

SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of every setting, from seeds 0, 1, ...", lower_bound=1)


def shared_base(config: ConfigDict, workdir: Path) -> tuple[pipeline.Run, Path]:
    """Trains or reads the base network that several runs share.

    Args:
      config: Configuration of the base.
      workdir: Its folder.

    Returns:
      The run that it belongs to, and the folder of `save_pruned` that holds it, for `base.weights`.
    """
    folder = workdir / "network"
    job = pipeline.prepare(config, workdir)
    if parallel.any_process(not (folder / DESCRIPTION).exists()):
        with job.guard:
            variables = pipeline.base(job)
        parallel.on_first_process(lambda: save_pruned(folder, *job.network.bind(variables)))
    return job, folder
