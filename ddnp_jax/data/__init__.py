"""Data sets of TFDS: what is read, its held-out splits, the order of its images and how they come to the devices."""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from ddnp_jax.data.cifar10 import Cifar10
from ddnp_jax.data.digits import Digits
from ddnp_jax.data.imagenet2012 import Imagenet2012
from ddnp_jax.data.images import Images, InMemory, Streamed, augment, normalize, read_ahead
from ddnp_jax.data.order import Draws, batches, evaluation_batches, split, steps_per_epoch

__all__ = [
    "BUILDERS",
    "Dataset",
    "Draws",
    "Images",
    "InMemory",
    "Streamed",
    "augment",
    "batches",
    "evaluation_batches",
    "label",
    "load",
    "normalize",
    "open_builder",
    "open_records",
    "read_ahead",
    "split",
    "steps_per_epoch",
]

BUILDERS = {"cifar10": Cifar10, "digits": Digits, "imagenet2012": Imagenet2012}
READ_BLOCK = 1000  # records per read: one call per record costs more than the decoding


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
      name: of the data set.
      num_classes: labels are 0..num_classes - 1.
      image_shape: (H, W, C), as the network sees images.
      train: the training images, in record order.
      test: the images on which accuracies are reported, in record order.
      splits: "train", "search" and "validation" -> sorted int32 indices into `train`; disjoint, together all.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    train: Images
    test: Images
    splits: dict[str, np.ndarray]


def load(config: ml_collections.ConfigDict) -> Dataset:
    """Opens a data set and draws its held-out splits.

    Images of one size are read into memory; photographs of any size are streamed.

    Args:
      config: the `data` section: `name`; `data_dir`, the folder of TFDS's prepared data (None or "": TFDS's own folder,
        where cifar10 is downloaded to and imagenet2012 prepared; digits is prepared wherever it is missing);
        `train_split`, the training images to use, in TFDS's form; `seed` of the held-out splits; `search_fraction` and
        `validation_fraction` of these images; `mean` and `std` per channel in units of [0, 1]; `pad` in pixels and
        `flip`; for photographs `crop_size` and `resize_size` in pixels and `threads`.

    Returns:
      The data set.

    Raises:
      ValueError: a field's value is impossible.
      FileNotFoundError: `data_dir` holds no such data set.
      OSError: the data set can be neither found nor prepared.
    """
    if config.name not in BUILDERS:
        raise ValueError(f"data.name={config.name!r} is unknown; known data sets: {', '.join(sorted(BUILDERS))}.")
    _check_splits(config.seed, config.search_fraction, config.validation_fraction)
    builder = open_builder(config.name, config.data_dir)
    features = builder.info.features
    height, width, channels = features["image"].shape
    _check_pixels(config, channels)
    train = _images(_train_records(builder, config.train_split), features["image"].shape, config)
    test = _images(open_records(builder, builder.TEST_SPLIT), features["image"].shape, config)
    return Dataset(
        name=config.name,
        num_classes=features["label"].num_classes,
        image_shape=(height or config.crop_size, width or config.crop_size, channels),
        train=train,
        test=test,
        splits=split(len(train), config.seed, config.search_fraction, config.validation_fraction),
    )


def label(config: ml_collections.ConfigDict) -> str:
    """How reports call the data of a `data` section; they do not hide that it is a slice."""
    return config.label if config.train_split == "train" else f"{config.label}, {config.train_split}"


def _check_splits(seed: int, search: float, validation: float) -> None:
    if seed < 0:
        raise ValueError(f"data.seed={seed} must be a whole number, 0 or more.")
    for field, value in (("search_fraction", search), ("validation_fraction", validation)):
        if not 0 <= value < 1:
            raise ValueError(f"data.{field}={value} is no fraction of the training images; use 0 <= {field} < 1.")
    if search + validation >= 1:
        raise ValueError(
            f"data.search_fraction={search} and data.validation_fraction={validation} leave no training images; "
            "their sum must be below 1."
        )


def _check_pixels(config: ml_collections.ConfigDict, channels: int) -> None:
    for field in ("mean", "std"):
        if len(config[field]) != channels:
            raise ValueError(
                f"data.{field} has {len(config[field])} entries; the images of {config.name} have {channels} channels."
            )
    if min(config.std) <= 0:
        raise ValueError(f"data.std={tuple(config.std)} must be positive in every channel.")
    if config.pad < 0:
        raise ValueError(f"data.pad={config.pad} must be a number of pixels, 0 or more.")
    if not 0 < config.crop_size <= config.resize_size:
        raise ValueError(
            f"data.crop_size={config.crop_size} must be from 1 to data.resize_size={config.resize_size} pixels."
        )
    if config.threads < 0:
        raise ValueError(f"data.threads={config.threads} must be a number of threads, or 0 for one per core.")


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set whose files are in place, preparing them where that is allowed; raises as `load`.

    Args:
      name: a key of `BUILDERS`.
      data_dir: as in `load`.
    """
    data_dir = os.path.expanduser(data_dir or "") or None
    builder = BUILDERS[name](data_dir=data_dir)
    if data_dir and name != "digits" and not _is_prepared(builder):
        raise FileNotFoundError(
            f"data.data_dir={data_dir!r} holds no prepared {name} ({builder.data_dir} has no dataset_info.json); "
            "set it to a folder with TFDS's prepared data in the array_record format, or leave it empty for a download."
        )
    if not _is_prepared(builder):
        try:
            builder.download_and_prepare(file_format="array_record")
        except OSError as error:
            if not _is_prepared(builder):  # else another process, preparing at the same time, was first
                raise OSError(
                    f"{name} could not be prepared in {builder.data_dir} ({error}); set data.data_dir to a folder "
                    f"{'that can be written' if name == 'digits' else 'that holds its prepared TFDS data'}."
                ) from error
        builder = BUILDERS[name](data_dir=data_dir)
    if not _is_prepared(builder) or builder.info.file_format.value != "array_record":
        raise FileNotFoundError(
            f"{builder.data_dir} exists but is no complete data set in TFDS's array_record format; move it away, or "
            "set data.data_dir to another folder."
        )
    return builder


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the files are in place: TFDS writes into a temporary folder and renames it at the end."""
    return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))


def open_records(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
    """The records of a split, with random access, their images encoded as they are stored."""
    # TFDS's choice of a decoder depends on what else is installed.
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _train_records(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
    """The training records or a slice of them, and nothing of other splits."""
    count = builder.info.splits["train"].num_examples
    if re.fullmatch(r"train(\[[^\]]*\])?", split):
        with contextlib.suppress(ValueError):  # TFDS's messages do not know the field
            (part,) = tfds.core.splits.AbstractSplit.from_spec(split).to_absolute(builder.info.splits)
            if (part.from_ or 0) < (count if part.to is None else part.to):  # TFDS reads backward slices as others
                return open_records(builder, split)
    raise ValueError(
        f"data.train_split={split!r} is no part of the {count} training images; "
        "use 'train', or a slice in TFDS's form, 'train[:2000]' or 'train[10%:20%]'."
    )


def _images(records: Any, shape: tuple[int | None, ...], config: ml_collections.ConfigDict) -> Images:
    return Streamed(records, config) if None in shape else InMemory(*_read_all(records, shape), config)


def _read_all(records: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 (N, *shape), and labels, int32 (N,), in record order."""
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    with tqdm(desc=f"reading {records.split}", total=len(records), unit="image", delay=1) as progress:
        for start in range(0, len(records), READ_BLOCK):
            block = records.__getitems__(range(start, min(start + READ_BLOCK, len(records))))
            for i, record in enumerate(block, start):
                with Image.open(io.BytesIO(record["image"])) as image:
                    images[i] = np.asarray(image).reshape(shape)
                labels[i] = record["label"]
            progress.update(len(block))
    return images, labels
