"""The command line that all experiments share."""

from absl import app, flags, logging
from ml_collections import config_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command goes on from what it holds.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Whether several processes share the run (pods, several hosts).")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0; found by itself on TPU and Slurm."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, where JAX cannot find it out.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which process this is, where JAX cannot find it out.")


def run(default_config: str) -> None:
    """Runs the main job with --config (by default `default_config`) in --workdir."""
    config = config_flags.DEFINE_config_file("config", default_config, "Configuration file, path[:argument].")
    flags.mark_flag_as_required("workdir")

    def main(_: list[str]) -> None:
        from ddnp_jax import parallel, pipeline

        logging.set_verbosity(logging.WARNING)  # orbax writes a page per checkpoint
        parallel.initialize(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        try:
            report = pipeline.run(config.value, _WORKDIR.value)
        except (ValueError, OSError, FloatingPointError) as error:
            raise SystemExit(f"error: {error}") from error
        print(f"{report['pruned_top1']:.2f} % (base {report['base_top1']:.2f} %); report: {_WORKDIR.value}/report.md")

    app.run(main)
