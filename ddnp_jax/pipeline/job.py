"""The full pipeline: its inputs, checked before any work, and the order of its stages."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddnp_jax import data, export, files, methods, models, parallel, torch_weights
from ddnp_jax.compact import Rebuild, rehearse
from ddnp_jax.config import STAGES, Config, DataConfig, Stage, as_dict, check, typed
from ddnp_jax.cost import latency, multiples, network_times
from ddnp_jax.cost.budget import Budget
from ddnp_jax.cost.kinds import make_budget
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.fields import listed
from ddnp_jax.methods import stored
from ddnp_jax.models.layers import Backbone
from ddnp_jax.named import network_of
from ddnp_jax.networks import Network, Outputs, as_network, first_line, picked
from ddnp_jax.pipeline import exporting, identity, report, stages
from ddnp_jax.pipeline.results import Results, summarize
from ddnp_jax.pipeline.workdir import check_room, check_workdir, claim_workdir, locked
from ddnp_jax.preemption import PreemptionGuard
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Topology, trace, variable_shapes
from ddnp_jax.training import loop
from ddnp_jax.training.log import MetricsLog

# Fields of the configuration that may change when a run resumes: they do not affect the pruned network, or are paths
# that are compared by their contents.
_MAY_DIFFER = ("data.threads", "data.data_dir", "base.weights", "search.selection", "finetune.control", "export")
_KEPT, _BYTES = 4, 4  # checkpoints of a stage, including the one being written; bytes of a float32
_WRITTEN = ("results.json", "metrics.jsonl", *STAGES)  # files and folders of a workdir that has been used


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
        indices, used = _indices(self.dataset, stage), self.config.search.images
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


def _indices(dataset: data.Dataset, stage: Stage) -> np.ndarray:
    """Training images of a stage: base training excludes the search images, fine-tuning includes them."""
    splits = dataset.splits
    if stage == "search":
        return splits["search"]
    return splits["train"] if stage == "base" else np.sort(np.concatenate([splits["train"], splits["search"]]))


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
    _check_named(config, model, dataset)
    config = dataclasses.replace(config, data=data.complete(config.data))
    check(config)
    for form in _formats(config):
        export.check_installed(form)
    _check_batches(config)
    _check_weights_exist(config.base.weights)
    dataset = dataset or data.load(config.data)
    _check_splits(config, dataset)
    network, name = _network(config, model, dataset.num_classes)
    _check_outputs(network, dataset, outputs)
    selection = _stored_selection(config)
    topology = trace(network.model, dataset.image_shape, residual=config.budget.residual)
    network = as_network(network.model, **dict(topology.call_kwargs))
    workdir = Path(workdir)
    batch = config.budget.latency_batch or _local_batch(config)
    timer = NetworkTimer(network.model, topology, batch, config.budget.runtime, rebuild=rebuild)
    weights = _given_weights(config.base.weights, network, topology)
    own = {**as_dict(config), "given": identity.given(network, dataset, config.base.weights, selection)}
    _check_workdir(workdir, own)  # a measured budget writes its table there
    measured = functools.partial(latency.measured_once, workdir / latency.FILE, timer)
    multiple_times = functools.partial(multiples.measured_once, workdir / multiples.FILE, timer)
    budget = make_budget(config.budget, timer, measured, multiple_times)
    shapes = variable_shapes(network, jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32))
    _check_cut(network, shapes, rebuild, topology, budget, config.budget.residual, outputs)
    _check_search(config, network, shapes, topology, budget, outputs)
    check_room(workdir, 2 * _KEPT * sum(math.prod(v.shape) * _BYTES for v in topology.variables))
    lasting = identity.stripped(own, _MAY_DIFFER)
    log = MetricsLog(workdir / "metrics.jsonl", identity.made_from(lasting))
    results = Results(workdir / "results.json")
    _check_written(workdir, log, results)
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


def _check_named(config: Config, model: Any, dataset: data.Dataset | None) -> None:
    """Raises for a custom network without any images: the default, CIFAR-10, would be downloaded."""
    if model is not None and dataset is None and config.data == DataConfig():
        raise ValueError(
            "dataset= is missing beside model=; give one of data.from_folder or data.from_arrays, or name a data set "
            "of TFDS and its folder in the configuration (data.name, data.data_dir)."
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


def _check_outputs(network: Network, dataset: data.Dataset, outputs: Outputs) -> None:
    """Raises for a network whose outputs are not logits of the data set's classes; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)

    def evaluated(rng: jax.Array, x: jax.Array) -> jax.Array:
        return picked(network.evaluate(network.initial(rng, x), x), outputs, network.name)

    def trained(rng: jax.Array, x: jax.Array) -> jax.Array:
        return picked(network.train(network.initial(rng, x), x, rng)[0], outputs, f"in training mode, {network.name}")

    modes = {"": evaluated}
    if not isinstance(network.model, Backbone):  # this library's return the same in both
        modes[" in training mode"] = trained
    for mode, logits in modes.items():
        shape = jax.eval_shape(logits, jax.random.key(0), images).shape
        if shape != (1, dataset.num_classes):
            raise ValueError(
                f"{network.name} returns {shape} for one image{mode}, and {dataset.name} has {dataset.num_classes} "
                f"classes; give it {dataset.num_classes} outputs, or pick the logits with outputs=."
            )


def _stored_selection(config: Config) -> Path | None:
    """The file of the channels to keep, of the method that takes one."""
    fields = config.search.method_fields()
    if not isinstance(fields, stored.Fields):
        return None
    try:
        return stored.file(fields.selection)
    except ValueError as error:
        raise ValueError(f"search.{error}") from error


def _check_workdir(workdir: Path, own: dict[str, Any]) -> None:
    check_workdir(workdir, own, _MAY_DIFFER)
    left = [name for name in _WRITTEN if (workdir / name).exists()]
    if left and not (workdir / "config.json").exists():
        raise ValueError(
            f"{workdir} has {left[0]} of a run but not its config.json; restore it, or use another workdir."
        )


def _check_written(workdir: Path, log: MetricsLog, results: Results) -> None:
    """Raises for files of an earlier start that no stage could read or resume from."""
    log.check()
    results.values()
    for folder in (workdir / name for name in (*STAGES, "pruned", exporting.FOLDER)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file where the run keeps a folder; move it away.")
    for stage in STAGES:
        loop.seconds(workdir / stage)


def _check_cut(
    network: Network,
    shapes: Any,
    rebuild: Rebuild | None,
    topology: Topology,
    budget: Budget,
    residual: bool,
    outputs: Outputs,
) -> None:
    """Prunes random variables: raises for a network that cannot be pruned, or not trained then, before any work."""
    if rebuild is None and isinstance(network.model, Backbone) and not residual:
        return
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return _zeros(leaf)
        values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        if leaf.ndim > 1:  # a kernel: activations keep their size, however deep the network is
            return values * math.sqrt(2 / math.prod(leaf.shape[:-1]))
        return abs(values)  # variances are positive

    drawn = jax.tree.map(draw, shapes)
    _check_trainable(*rehearse(network.model, drawn, topology, budget.smallest_widths, rebuild), topology, outputs)


def _check_trainable(model: Any, variables: Any, topology: Topology, outputs: Outputs) -> None:
    """Raises for a pruned network that cannot be called in training mode; nothing is computed."""
    small = as_network(model, **dict(topology.call_kwargs))

    def trained(variables: Any, images: jax.Array, rng: jax.Array) -> jax.Array:
        return picked(small.train(variables, images, rng)[0], outputs, small.name)

    images = jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32)
    try:
        jax.eval_shape(trained, small.variables(variables), images, jax.random.key(0))
    except Exception as error:  # anything that a network's own code may raise
        raise ValueError(
            f"{small.name} can be pruned, but not trained afterwards: {first_line(error)}. What it computes in "
            "training mode alone must not depend on channels that are removed."
        ) from error


def _zeros(leaf: jax.ShapeDtypeStruct) -> Any:
    """Zeros of a leaf's shape; of a random key, some key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return np.zeros(leaf.shape, leaf.dtype)


def _check_search(
    config: Config, network: Network, shapes: Any, topology: Topology, budget: Budget, outputs: Outputs
) -> None:
    """Raises for a network that the method cannot search; no step is computed."""
    fields = config.search.method_fields()
    image = jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    variables = jax.tree.map(_zeros, shapes)
    problem = methods.Problem(network.model, variables, topology, budget, fields, steps=1, outputs=outputs)
    try:
        search = methods.build(config.search.method, problem)
    except ValueError as error:
        raise ValueError(f"search.{error}") from error
    if search.survey is not None:
        values = jax.eval_shape(search.survey.of, variables, image)
        search = search.survey.then([np.zeros(value.shape[1:]) for value in values])
    if search.steps:
        state = jax.eval_shape(search.init, jax.random.key(0))
        jax.eval_shape(search.step, state, variables, (image, label), jax.random.key(0))
    else:
        search.propose(search.init(jax.random.key(0)))


def _check_batches(config: Config) -> None:
    """Raises for a batch that the devices cannot share equally."""
    for name in STAGES:
        section = config.stage(name)
        parts = f" / {name}.micro_batches" if section.micro_batches > 1 else ""
        parallel.check_batch(section.step_batch, f"{name}.batch_size{parts}")
    parallel.check_batch(config.eval_batch_size, "eval_batch_size")


def _check_splits(config: Config, dataset: data.Dataset) -> None:
    """Raises for splits that are smaller than a batch, or have no validation images."""
    for section in STAGES[1:] if config.base.weights else STAGES:
        found, batch_size = len(_indices(dataset, section)), config.stage(section).batch_size
        if found < batch_size:
            raise ValueError(
                f"search_fraction and validation_fraction leave {found} of the {len(dataset.train)} training images of "
                f"{dataset.name} to {section}, fewer than {section}.batch_size={batch_size}; change them, or take "
                "smaller batches."
            )
    if 0 < config.search.images < config.search.batch_size:
        raise ValueError(
            f"search.images={config.search.images} are fewer than search.batch_size={config.search.batch_size}; change "
            "one of the two."
        )
    if not len(dataset.splits["validation"]):
        raise ValueError(
            f"validation_fraction holds out none of the {len(dataset.train)} training images of {dataset.name} to "
            "choose the best checkpoint by; make it larger."
        )


def _check_weights_exist(path: str) -> None:
    if path and not Path(path).expanduser().exists():
        raise ValueError(
            f"base.weights={path!r} does not exist; give a PyTorch checkpoint, a folder of save_pruned, or '' to train."
        )


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
