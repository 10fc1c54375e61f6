"""Shared by commands of several runs: seeds and the base network."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from ddnp_jax import parallel, pipeline
from ddnp_jax.saved import DESCRIPTION, save_pruned

SEEDS = flags.DEFINE_integer("seeds", 3, "Number of runs per setting, with seeds 0, 1, ...", lower_bound=1)


def shared_base(config: ConfigDict, workdir: Path) -> tuple[pipeline.Run, Path]:
    """Trains or loads the base network that several runs share.

    Args:
      config: Configuration of the base network.
      workdir: Folder of its run.

    Returns:
      The run of the base network, and the folder where `save_pruned` has saved it, for `base.weights`.
    """
    folder = workdir / "network"
    job = pipeline.prepare(config, workdir)
    if parallel.any_process(not (folder / DESCRIPTION).exists()):
        with job.guard:
            variables = pipeline.base(job)
        parallel.on_first_process(lambda: save_pruned(folder, *job.network.bind(variables)))
    return job, folder
