"""What a run checks before any work: each check raises with one sentence that says what to change."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import data, methods, parallel
from ddnp_jax.compact import Rebuild, rehearse
from ddnp_jax.config import STAGES, Config, DataConfig
from ddnp_jax.cost.budget import Budget
from ddnp_jax.models.layers import Backbone
from ddnp_jax.networks import Network, Outputs, as_network, first_line, picked, stand_ins
from ddnp_jax.pipeline import exporting
from ddnp_jax.pipeline.results import Results
from ddnp_jax.pipeline.workdir import CONFIG
from ddnp_jax.topology import Topology
from ddnp_jax.training import loop
from ddnp_jax.training.log import MetricsLog

_WRITTEN = ("results.json", "metrics.jsonl", *STAGES)  # files and folders of a workdir that has been used


def images_are_given(config: Config, model: Any, dataset: data.Dataset | None) -> None:
    """Raises for a custom network without any images: the default, CIFAR-10, would be downloaded."""
    if model is not None and dataset is None and config.data == DataConfig():
        raise ValueError(
            "dataset= is missing beside model=; give one of data.from_folder or data.from_arrays, or name a data set "
            "of TFDS and its folder in the configuration (data.name, data.data_dir)."
        )


def batches(config: Config) -> None:
    """Raises for a batch that the devices cannot share equally."""
    for name in STAGES:
        section = config.stage(name)
        parts = f" / {name}.micro_batches" if section.micro_batches > 1 else ""
        parallel.check_batch(section.step_batch, f"{name}.batch_size{parts}")
    parallel.check_batch(config.eval_batch_size, "eval_batch_size")


def weights_exist(path: str) -> None:
    """Raises for a `base.weights` that names no file or folder."""
    if path and not Path(path).expanduser().exists():
        raise ValueError(
            f"base.weights={path!r} does not exist; give a PyTorch checkpoint, a folder of save_pruned, or '' to train."
        )


def splits(config: Config, dataset: data.Dataset) -> None:
    """Raises for splits that are smaller than a batch, or have no validation images."""
    for section in STAGES[1:] if config.base.weights else STAGES:
        found, batch_size = len(dataset.indices(section)), config.stage(section).batch_size
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


def outputs(network: Network, dataset: data.Dataset, outputs: Outputs) -> None:
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


def cut(
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
    drawn = stand_ins.random(shapes)
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


def search(config: Config, network: Network, shapes: Any, topology: Topology, budget: Budget, outputs: Outputs) -> None:
    """Raises for a network that the method cannot search; no step is computed."""
    fields = config.search.method_fields()
    image = jax.ShapeDtypeStruct((1, *topology.input_shape), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    variables = stand_ins.zeros(shapes)
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


def config_is_kept(workdir: Path) -> None:
    """Raises for a workdir that has been used and has lost its `config.json`."""
    left = [name for name in _WRITTEN if (workdir / name).exists()]
    if left and not (workdir / CONFIG).exists():
        raise ValueError(f"{workdir} has {left[0]} of a run but not its {CONFIG}; restore it, or use another workdir.")


def written(workdir: Path, log: MetricsLog, results: Results) -> None:
    """Raises for files of an earlier start that no stage could read or resume from."""
    log.check()
    results.values()
    for folder in (workdir / name for name in (*STAGES, "pruned", exporting.FOLDER)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file where the run keeps a folder; move it away.")
    for stage in STAGES:
        loop.seconds(workdir / stage)
