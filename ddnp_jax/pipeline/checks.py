"""What the fields of a configuration may be and mean by themselves, before any data are read."""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ddnp_jax import methods, parallel, training
from ddnp_jax.training.steps import check_decay

STAGES = ("base", "search", "finetune")

# The smallest and largest value of numbers that would otherwise fail late, or silently train something else.
_TRAINER = {
    "learning_rate": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "warmup_epochs": (0.0, math.inf),
    "label_smoothing": (0.0, 1.0),
}
_LIMITS = {
    "seed": (0, math.inf),
    **{f"{stage}.{field}": (1, math.inf) for stage in STAGES for field in ("chunk_steps", "save_every")},
    **{f"{stage}.{field}": limits for stage in ("base", "finetune") for field, limits in _TRAINER.items()},
    "base.epochs": (1, math.inf),
    "search.epochs": (1, math.inf),
    "search.resource_weight": (0.0, math.inf),
    "finetune.epochs": (0, math.inf),  # 0: the cut network is the result
    "finetune.distillation_weight": (0.0, 1.0),
    "finetune.distillation_temperature": (1e-3, math.inf),
    "finetune.recalibration_steps": (0, math.inf),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks a configuration by itself; needs the devices' number, but no data and no network.

    Raises:
      ValueError: The field and what it may be are named.
    """
    computation_dtype(config.precision)
    _check_numbers(config)
    for section in STAGES:
        _check_batch(section, config[section])
    parallel.check_batch(config.eval_batch_size, "eval_batch_size")
    method_fields(config.search)
    for section in ("base", "finetune"):
        _check_schedule(section, config[section])
    parallel.check_mode(config.parallel.mode)


def method_fields(section: ml_collections.ConfigDict) -> Any:
    """The fields of the method that the `search` section names.

    Raises:
      ValueError: The field and what it may be are named.
    """
    try:
        names = methods.default_fields(section.method)
        missing = [name for name in names if name not in section]
        if missing:
            raise ValueError(
                f"method={section.method!r} needs search.{missing[0]}, which this configuration lacks; choose the "
                f"method by the configuration's argument, --config=FILE.py:{section.method}."
            )
        return methods.configure(section.method, {name: section.to_dict()[name] for name in names})
    except ValueError as error:
        raise ValueError(f"search.{error}") from error


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    for name, (least, most) in _LIMITS.items():
        value = functools.reduce(operator.getitem, name.split("."), config)
        if not least <= value <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name}={value} must be {wanted}.")


def _check_schedule(name: str, section: ml_collections.ConfigDict) -> None:
    if section.warmup_epochs >= section.epochs > 0:
        raise ValueError(
            f"{name}.warmup_epochs={section.warmup_epochs} must be below the {section.epochs} epochs of the stage."
        )
    try:
        check_decay(section.decay_at)
        schedule(section, updates_per_epoch=1)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def schedule(section: ml_collections.ConfigDict, updates_per_epoch: int) -> optax.Schedule:
    """The schedule of a section of the trainer, which counts in epochs."""
    steps = section.epochs * updates_per_epoch
    warmup_steps = min(round(section.warmup_epochs * updates_per_epoch), max(steps - 1, 0))
    return training.schedule(section.schedule, section.learning_rate, steps, warmup_steps, section.decay_at)


def optimizer(section: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD as a section of the trainer describes it.

    Args:
      section: Section of the trainer.
      steps_per_epoch: Steps per epoch, of which each update takes `micro_batches`.
    """
    rate = schedule(section, steps_per_epoch // section.micro_batches)
    return training.sgd(rate, section.momentum, section.weight_decay, section.micro_batches)


def _check_batch(name: str, section: ml_collections.ConfigDict) -> None:
    parts = section.get("micro_batches", 1)
    if parts < 1 or section.batch_size % parts:
        raise ValueError(f"{name}.batch_size={section.batch_size} has no {name}.micro_batches={parts} equal parts.")
    parallel.check_batch(step_batch(section), f"{name}.batch_size" + (f" / {name}.micro_batches" if parts > 1 else ""))


def step_batch(section: ml_collections.ConfigDict) -> int:
    """Images per step of a section of the configuration, over all devices."""
    return section.batch_size // section.get("micro_batches", 1)


def computation_dtype(precision: str) -> Any:
    """The data type that a configuration's `precision` names.

    Raises:
      ValueError: It is unknown.
    """
    dtypes = {"float32": np.float32, "bfloat16": jnp.bfloat16}
    if precision not in dtypes:
        raise ValueError(f"precision={precision!r} is unknown; use {' or '.join(map(repr, dtypes))}.")
    return dtypes[precision]
