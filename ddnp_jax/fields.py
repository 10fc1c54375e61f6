"""What the fields of a configuration may be and mean by themselves, before any data are read."""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from ddnp_jax import methods, parallel, training

STAGES = ("base", "search", "finetune")

# The smallest and largest value of numbers that would otherwise fail late, or train something else without a word.
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
    """Refuses a configuration by itself; needs the devices' number, but no data and no network.

    Raises:
      ValueError: names the field and what it may be.
    """
    computation_dtype(config.precision)
    _check_numbers(config)
    for section in STAGES:
        _check_batch(section, config[section])
    parallel.check_batch(config.eval_batch_size, "eval_batch_size")
    methods.check(config.search)
    for section in ("base", "finetune"):
        _check_schedule(section, config[section])
    parallel.check_mode(config.parallel.mode)


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    for name, (least, most) in _LIMITS.items():
        value = functools.reduce(operator.getitem, name.split("."), config)
        if not least <= value <= most:
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name}={value} must be {wanted}.")


def _check_schedule(name: str, section: ml_collections.ConfigDict) -> None:
    try:
        training.schedule(section, updates_per_epoch=1)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


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
      ValueError: it is unknown.
    """
    dtypes = {"float32": np.float32, "bfloat16": jnp.bfloat16}
    if precision not in dtypes:
        raise ValueError(f"precision={precision!r} is unknown; use {' or '.join(map(repr, dtypes))}.")
    return dtypes[precision]
