"""Data sets: what is read, its held-out splits, the order of its images and how they come to the devices."""

from pathlib import Path
from typing import Any

from ddnp_jax import extras

with extras.needed_by("ddnp_jax.data"):
    from ddnp_jax.data.arrays import from_arrays
    from ddnp_jax.data.dataset import Dataset, HeldOut
    from ddnp_jax.data.folder import from_folder, open_folder
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

FOLDER = "folder"  # the name of every data set that is a folder of image files
_LABELS = {"cifar10": "CIFAR-10", "imagenet2012": "ImageNet"}


def load(config: Any) -> Dataset:
    """Opens a data set and draws its held-out splits.

    Images of one small size are read into memory; others are streamed.

    Args:
      config: the `data` section: `name`, "folder" or a name of TFDS; `data_dir`, the folder of image files or of TFDS's
        prepared data (None or "": TFDS's own folder, where cifar10 is downloaded to and imagenet2012 prepared; digits
        is prepared wherever it is missing); `label`; `train_split` and `test_split`, the images to use, in TFDS's form;
        `test_fraction` of a folder without test images; the fields of `HeldOut` and of `Preprocessing`.

    Returns:
      The data set.

    Raises:
      ValueError: a field's value is impossible, or an image is damaged.
      FileNotFoundError: `data_dir` holds no such data set.
      OSError: the data set can be neither found nor prepared.
    """
    preprocessing = Preprocessing.of(config)
    held_out = HeldOut(config.seed, config.search_fraction, config.validation_fraction)
    if config.name == FOLDER:
        _check_folder(config)
        return open_folder(
            config.data_dir, label(config), preprocessing, held_out, config.test_fraction, section="data."
        )
    with extras.needed_by(f"data.name={config.name!r}"):
        from ddnp_jax.data import prepared  # here, because arrays and folders do without TFDS

    return prepared.open_prepared(
        config.name, config.data_dir, config.train_split, config.test_split, preprocessing, held_out, label(config)
    )


def label(config: Any) -> str:
    """How reports call the data of a `data` section; they do not hide that it is a slice."""
    own = Path(config.data_dir or "").name if config.name == FOLDER else _LABELS.get(config.name, config.name)
    parts = [config.label or own]
    if config.train_split != "train":
        parts.append(config.train_split)
    if "[" in config.test_split:
        parts.append(f"tested on {config.test_split}")
    return ", ".join(parts)


def _check_folder(config: Any) -> None:
    if not config.data_dir:
        raise ValueError("data.data_dir must be the folder of images where data.name='folder'.")
    for field, usual in (("train_split", "train"), ("test_split", "")):
        value = getattr(config, field)
        if value != usual:
            raise ValueError(
                f"data.{field}={value!r} is for TFDS's data sets; leave it {usual!r} for a folder of images."
            )
