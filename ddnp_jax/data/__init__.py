"""Data sets: loading, held-out splits, the order of images and their transfer to the devices."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ddnp_jax import extras
from ddnp_jax.config import DataConfig

with extras.needed_by("ddnp_jax.data"):
    from ddnp_jax.data.arrays import from_arrays
    from ddnp_jax.data.dataset import Dataset, HeldOut
    from ddnp_jax.data.folder import IMAGENET_MEAN, IMAGENET_STD, from_folder, open_folder
    from ddnp_jax.data.images import Images, InMemory, Streamed, augment, normalize, read_ahead
    from ddnp_jax.data.order import BatchIndices, batches, evaluation_batches, split, steps_per_epoch
    from ddnp_jax.data.preprocessing import Preprocessing

__all__ = [
    "BatchIndices",
    "Dataset",
    "HeldOut",
    "Images",
    "InMemory",
    "Preprocessing",
    "Streamed",
    "augment",
    "batches",
    "complete",
    "evaluation_batches",
    "from_arrays",
    "from_folder",
    "label",
    "load",
    "normalize",
    "read_ahead",
    "split",
    "steps_per_epoch",
]

FOLDER = "folder"  # value of `data.name` for a folder of image files


class _Usual(NamedTuple):
    """Defaults of a data set: its name in reports, and mean and standard deviation per channel, in RGB order."""

    label: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


_USUAL: Mapping[str, _Usual] = {
    "cifar10": _Usual("CIFAR-10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "digits": _Usual("digits", (0.3,), (0.35,)),
    "imagenet2012": _Usual("ImageNet", IMAGENET_MEAN, IMAGENET_STD),
    FOLDER: _Usual("", IMAGENET_MEAN, IMAGENET_STD),  # as `from_folder`
}


def complete(config: DataConfig) -> DataConfig:
    """Fills in the default mean and standard deviation of a data set in its `data` section, if it has none.

    They stay empty for unknown data sets; `load` then raises an error.
    """
    if config.name not in _USUAL:
        return config
    usual, step = _USUAL[config.name], -1 if config.bgr else 1
    return dataclasses.replace(config, mean=config.mean or usual.mean[::step], std=config.std or usual.std[::step])


def load(config: DataConfig) -> Dataset:
    """Opens a data set and draws its held-out splits.

    Small images of equal size are read into memory; others are streamed.

    Args:
      config: The `data` section. If `data_dir` is "", TFDS's default folder is used, to which cifar10 is downloaded and
        in which imagenet2012 is prepared; digits is prepared if it is missing.

    Returns:
      The data set.

    Raises:
      ValueError: A field is invalid, or an image is damaged.
      FileNotFoundError: `data_dir` does not contain the data set.
      OSError: The data set can neither be found nor prepared.
    """
    config = complete(config)
    preprocessing = Preprocessing.of(config)
    held_out = HeldOut(config.seed, config.search_fraction, config.validation_fraction)
    if config.name == FOLDER:
        _check_folder(config)
        return open_folder(
            config.data_dir, label(config), preprocessing, held_out, config.test_fraction, section="data."
        )
    with extras.needed_by(f"data.name={config.name!r}"):
        from ddnp_jax.data import prepared  # imported here, because arrays and folders do not need TFDS

    return prepared.open_prepared(
        config.name, config.data_dir, config.train_split, config.test_split, preprocessing, held_out, label(config)
    )


def label(config: DataConfig) -> str:
    """Returns the name in reports of a `data` section's data set, including its slice."""
    known = _USUAL[config.name].label if config.name in _USUAL else config.name
    parts = [config.label or known or Path(config.data_dir).name]
    if config.train_split != "train":
        parts.append(config.train_split)
    if "[" in config.test_split:
        parts.append(f"tested on {config.test_split}")
    return ", ".join(parts)


def _check_folder(config: DataConfig) -> None:
    if not config.data_dir:
        raise ValueError("data.data_dir must be the folder of images where data.name='folder'.")
    for field, usual in (("train_split", "train"), ("test_split", "")):
        value = getattr(config, field)
        if value != usual:
            raise ValueError(
                f"data.{field}={value!r} is for TFDS's data sets; leave it {usual!r} for a folder of images, as "
                "configs/own.py does."
            )
