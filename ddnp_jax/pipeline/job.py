"""The full pipeline: its inputs and the order of its stages."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddnp_jax import data, export, files, models, parallel, torch_weights
from ddnp_jax.compact import Rebuild
from ddnp_jax.config import Config, Stage, as_dict, check, typed
from ddnp_jax.cost import latency, multiples, network_times
from ddnp_jax.cost.budget import Budget
from ddnp_jax.cost.kinds import make_budget
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.fields import listed
from ddnp_jax.methods import stored
from ddnp_jax.named import network_of
from ddnp_jax.networks import Network, Outputs, as_network
from ddnp_jax.pipeline import checks, exporting, identity, report, stages
from ddnp_jax.pipeline.results import Results, summarize
from ddnp_jax.pipeline.workdir import check_room, check_workdir, claim_workdir, locked
from ddnp_jax.preemption import PreemptionGuard
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Topology, trace, variable_shapes
from ddnp_jax.training.log import MetricsLog

# Fields of the configuration that may change when a run resumes: they do not affect the pruned network, or are paths
# that are compared by their contents.
_MAY_DIFFER = ("data.threads", "data.data_dir", "base.weights", "search.selection", "finetune.control", "export")
_KEPT, _BYTES = 4, 4  # checkpoints of a stage, including the one being written; bytes of a float32


@dataclasses.dataclass(frozen=True)
class Run:
    """The inputs of every stage, created and checked before any work on a device.

    Attributes:
      config: The full configuration.
      workdir: Folder of all output files.
      dataset: The images and their splits.
      name: Name of the model.
      network: The unpruned network.
      rebuild: Builds the smaller network from the channels per gate, if `compact` needs it.
      topology: Topology of the network.
      budget: Budget to meet.
      weights: Variables of the unpruned network from `base.weights`; None if it is trained.
      log: `metrics.jsonl`.
      results: `results.json`.
      outputs: Which of the network's outputs are the logits, if there are several.
      identity: Contents of `config.json` that identify this run, without the fields that may change when it resumes.
      guard: Context manager that requests the run to stop on a signal.
    """

    config: Config
    workdir: Path
    dataset: data.Dataset
    name: str
    network: Network
    rebuild: Rebuild | None
    topology: Topology
    budget: Budget
    weights: Any
    log: MetricsLog
    results: Results
    outputs: Outputs
    identity: dict[str, Any]
    guard: PreemptionGuard

    def made_from(self, *inputs: Any) -> str:
        """Returns a fingerprint of a result's inputs: the run's identity and pytrees of arrays."""
        return identity.made_from(self.identity, *inputs)

    def timed_from(self, runtime: str, *inputs: Any) -> str:
        """Returns a fingerprint of a time's inputs, which are also the devices."""
        return self.made_from(*inputs, network_times.device_of(runtime), parallel.description())

    def stage_images(self, stage: Stage) -> np.ndarray:
        """Returns the indices of a stage's training images."""
        indices, used = self.dataset.indices(stage), self.config.search.images
        if stage == "search" and used:
            return np.sort(np.random.default_rng(self.config.seed).permutation(indices)[:used])
        return indices

    def stage_steps(self, stage: Stage) -> tuple[int, int]:
        """Returns (total steps, steps per epoch) of a stage; with gradient accumulation, an update takes several."""
        config = self.config.stage(stage)
        updates = data.steps_per_epoch(len(self.stage_images(stage)), config.batch_size)
        per_epoch = updates * config.micro_batches
        return config.epochs * per_epoch, per_epoch

    def host_batches(self, stage: Stage, augment: bool, first: int, last: int) -> Any:
        """What the host reads for the steps `first` to `last` - 1 of a stage, this process's part, chunk by chunk."""
        config, images = self.config.stage(stage), self.dataset.train
        batches = data.batches(
            self.stage_images(stage), config.step_batch, self.config.seed, process=parallel.process()
        )
        read = functools.partial(images.read, seed=self.config.seed if augment else None)
        return data.read_ahead(batches[first:last], read, images.threads, config.chunk_steps)

    def constants(self, step_constants: Any) -> dict[str, Any]:
        """Returns the constants of `training.chunk_of`, replicated on every device."""
        return {"images": self.dataset.train.on_devices, "step": parallel.replicate(step_constants)}

    @property
    def local_batch(self) -> int:
        """Images of an evaluation batch per device."""
        return _local_batch(self.config)


def _local_batch(config: Config) -> int:
    return config.eval_batch_size // jax.device_count()


def prepare(
    config: Config | ConfigDict,
    workdir: str | Path,
    model: Any = None,
    rebuild: Rebuild | None = None,
    dataset: data.Dataset | None = None,
    outputs: Outputs = None,
) -> Run:
    """Checks the configuration and reads data and initial weights; arguments as for `run`.

    Raises:
      ValueError: A field is invalid, the budget cannot be met, the weights do not match the model, or the workdir
        belongs to another run.
      ModuleNotFoundError: A package of `config.export` is missing.
    """
    config = typed(config)
    checks.images_are_given(config, model, dataset)
    config = dataclasses.replace(config, data=data.complete(config.data))
    check(config)
    for form in _formats(config):
        export.check_installed(form)
    checks.batches(config)
    checks.weights_exist(config.base.weights)
    dataset = dataset or data.load(config.data)
    checks.splits(config, dataset)
    network, name = _network(config, model, dataset.num_classes)
    checks.outputs(network, dataset, outputs)
    selection = _stored_selection(config)
    topology = trace(network.model, dataset.image_shape, residual=config.budget.residual)
    network = as_network(network.model, **dict(topology.call_kwargs))
    workdir = Path(workdir)
    batch = config.budget.latency_batch or _local_batch(config)
    timer = NetworkTimer(network.model, topology, batch, config.budget.runtime, rebuild=rebuild)
    weights = _given_weights(config.base.weights, network, topology)
    own = {**as_dict(config), "given": identity.given(network, dataset, config.base.weights, selection)}
    check_workdir(workdir, own, _MAY_DIFFER)  # a measured budget writes its table there
    checks.config_is_kept(workdir)
    measured = functools.partial(latency.measured_once, workdir / latency.FILE, timer)
    multiple_times = functools.partial(multiples.measured_once, workdir / multiples.FILE, timer)
    budget = make_budget(config.budget, timer, measured, multiple_times)
    shapes = variable_shapes(network, jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32))
    checks.cut(network, shapes, rebuild, topology, budget, config.budget.residual, outputs)
    checks.search(config, network, shapes, topology, budget, outputs)
    check_room(workdir, 2 * _KEPT * sum(math.prod(v.shape) * _BYTES for v in topology.variables))
    lasting = identity.stripped(own, _MAY_DIFFER)
    log = MetricsLog(workdir / "metrics.jsonl", identity.made_from(lasting))
    results = Results(workdir / "results.json")
    checks.written(workdir, log, results)
    claim_workdir(workdir, own, _MAY_DIFFER)
    return Run(
        config=config,
        workdir=workdir,
        dataset=dataset,
        name=name,
        network=network,
        rebuild=rebuild,
        topology=topology,
        budget=budget,
        weights=weights,
        log=log,
        results=results,
        outputs=outputs,
        identity=lasting,
        guard=PreemptionGuard(),
    )


def _formats(config: Config) -> set[str]:
    """Formats of `ddnp_jax.export` that the run needs."""
    return {*listed(config.export), *exporting.timed(config)}


def _network(config: Config, model: Any, num_classes: int) -> tuple[Network, str]:
    """The network to prune and its name: the user's, or the one that the configuration names."""
    name, attributes = config.model.name, config.model.attributes
    if model is None and ":" not in name:
        return as_network(models.create(name, num_classes, **{**attributes, "dtype": config.dtype})), name
    if model is None:
        model, variables = network_of(name, attributes, num_classes)
        if variables is not None:
            raise ValueError(f"model.name={name!r} must be a flax module, whose weights base.weights names, if any.")
    network = as_network(model)
    if config.precision != "float32":
        raise ValueError(
            f"precision={config.precision!r} is for this library's models; give {network.name} its own data type."
        )
    return network, network.name


def _stored_selection(config: Config) -> Path | None:
    """The file of the channels to keep, of the method that takes one."""
    fields = config.search.method_fields()
    if not isinstance(fields, stored.Fields):
        return None
    try:
        return stored.file(fields.selection)
    except ValueError as error:
        raise ValueError(f"search.{error}") from error


def _given_weights(path: str, network: Network, topology: Topology) -> Any:
    """Weights of a network from a PyTorch checkpoint, or from a folder written by `save_pruned`; None for ''."""
    if not path:
        return None
    file = Path(path).expanduser()
    if not file.is_dir():
        loaded = torch_weights.load(file, network.model, topology.input_shape)
        return as_network(loaded).variables(None) if network.kind == "nnx" else loaded
    loaded, variables = load_pruned(file, network.model)
    variables = as_network(loaded).variables(variables)
    try:
        topology.check(variables)
    except ValueError as error:
        raise ValueError(f"base.weights={path!r} is of another network, or of a pruned one: {error}") from error
    return variables


def run(
    config: Config | ConfigDict,
    workdir: str | Path,
    model: Any = None,
    rebuild: Rebuild | None = None,
    dataset: data.Dataset | None = None,
    outputs: Outputs = None,
) -> dict[str, Any]:
    """Runs or resumes the full pipeline: base training, search, pruning, fine-tuning, export and report.

    Args:
      config: Configuration of the experiment: a `ddnp_jax.config.Config`, or a ConfigDict with the same fields.
      workdir: Folder of all output files; an unfinished run in it is resumed.
      model: Custom network, a flax.linen or flax.nnx module; None for the backbone of `config.model`.
      rebuild: Builds the smaller network from the channels per gate, if `compact` needs it.
      dataset: Custom data set; None for that of `config.data`.
      outputs: Which of the network's outputs are the logits, if there are several: a key, an index or a function.

    Returns:
      The contents of `report.json`.

    Raises:
      ValueError: As for `prepare`.
    """
    with locked(workdir):
        job = prepare(config, workdir, model, rebuild, dataset, outputs)
        with job.guard:
            return _run(job)


def _run(job: Run) -> dict[str, Any]:
    if jax.process_index() == 0:
        print(job.topology.describe())
    job.log.restore_events()
    variables = stages.base(job)
    selection = stages.search(job, variables)
    small, small_variables = stages.cut(job, variables, selection)
    tuned = stages.finetune(job, variables, selection, small, small_variables)
    parallel.on_first_process(lambda: _save(job, small, tuned))
    if job.config.finetune.control:
        stages.control(job, variables)
    try:
        exporting.write(job, variables, small, tuned)
    finally:  # a network that cannot be exported still has its report
        found = report.write(job.workdir, summarize(job, selection))
    return found


def _save(job: Run, network: Network, variables: Any) -> None:
    """Saves the pruned network and the preprocessing of its input."""
    folder = job.workdir / "pruned"
    save_pruned(folder, *network.bind(variables))
    files.write_json(folder / export.SERVING_FILE, job.dataset.serving())
