"""Small image data sets: read once into memory as uint8, batched by index, normalized and augmented on the device.

A batch is an array of indices and a pure function of (seed, step), so a run resumes from its step alone and every
process computes its own part. The images it names are picked, augmented and normalized where they lie.
"""

import functools
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from ddnp_jax.cifar10 import Cifar10
from ddnp_jax.digits import Digits

BUILDERS = {"cifar10": Cifar10, "digits": Digits}
READ_BLOCK = 1000  # records per read: one call per record costs more than the decoding


@dataclass(frozen=True)
class Dataset:
    """A data set in host memory.

    Attributes:
      name: of the data set.
      num_classes: labels are 0..num_classes - 1.
      image_shape: (H, W, C).
      train_images: uint8 (N, H, W, C), in record order.
      train_labels: int32 (N,).
      test_images: uint8 (M, H, W, C), in record order.
      test_labels: int32 (M,).
      splits: "train", "search" and "validation" -> sorted int32 indices into train_images; disjoint, together all.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    splits: dict[str, np.ndarray]


def load(config: ml_collections.ConfigDict) -> Dataset:
    """Reads a data set and draws its held-out splits.

    Args:
      config: the `data` section: `name`; `data_dir`, the folder of TFDS's prepared data (None or "": TFDS's own folder,
        where cifar10 is downloaded to; digits is prepared wherever it is missing); `seed` of the held-out splits;
        `search_fraction` and `validation_fraction` of the training images; `mean` and `std` per channel in units of
        [0, 1]; `pad` in pixels.

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
    builder = _open_builder(config.name, os.path.expanduser(config.data_dir or "") or None)
    features = builder.info.features
    _check_pixels(config, features["image"].shape[-1])
    train_images, train_labels = _read(builder, "train")
    test_images, test_labels = _read(builder, "test")
    return Dataset(
        name=config.name,
        num_classes=features["label"].num_classes,
        image_shape=features["image"].shape,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        splits=split(len(train_images), config.seed, config.search_fraction, config.validation_fraction),
    )


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


def _open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set whose files are in place, preparing them where that is allowed."""
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


def _read(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 (N, H, W, C), and labels, int32 (N,), of a TFDS split in record order."""
    # Decoded here and by PIL alone, because TFDS's choice depends on what else is installed.
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    with tqdm(desc=f"reading {builder.name} {split}", total=len(source), unit="image", delay=1) as progress:
        for start in range(0, len(source), READ_BLOCK):
            records = source.__getitems__(range(start, min(start + READ_BLOCK, len(source))))
            for i, record in enumerate(records, start):
                with Image.open(io.BytesIO(record["image"])) as image:
                    images[i] = np.asarray(image).reshape(images.shape[1:])
                labels[i] = record["label"]
            progress.update(len(records))
    return images, labels


def split(count: int, seed: int, search_fraction: float, validation_fraction: float) -> dict[str, np.ndarray]:
    """Divides `count` training images by lot into three disjoint parts that together hold each image once.

    The search part depends on neither of the other two, so changing `validation_fraction` keeps it.

    Args:
      count: of the training images.
      seed: of the lot.
      search_fraction: of `count`, for the search (DDNP: 5 % on CIFAR-10).
      validation_fraction: of `count`, for choosing the best checkpoint.

    Returns:
      "train", "search" and "validation" -> sorted int32 indices.
    """
    order = np.random.default_rng(seed).permutation(count).astype(np.int32)
    search = round(search_fraction * count)
    validation = search + round(validation_fraction * count)
    parts = {"train": order[validation:], "search": order[:search], "validation": order[search:validation]}
    return {name: np.sort(part) for name, part in parts.items()}


def batches(
    indices: np.ndarray, batch_size: int, seed: int, *, shuffle: bool = True, process: tuple[int, int] = (0, 1)
) -> grain.MapDataset:
    """The endless sequence of training batches, with random access by step.

    The epochs follow one another without a gap, each a new global shuffle of all indices, and the sequence is cut into
    batches: nothing is dropped, and a batch may span two epochs. The sequence of global batches does not depend on the
    number of processes; each process gets its consecutive part of every one.

    Args:
      indices: int (N,), the images to use, each once per epoch.
      batch_size: of the global batch, over all processes; at most N.
      seed: of the shuffles.
      shuffle: False keeps the order of `indices` in every epoch.
      process: rank of this process and number of processes.

    Returns:
      Element `step` is this process' part of the batch: int32 (batch_size / processes,), a pure function of
      (seed, step).

    Raises:
      ValueError: the batch is larger than an epoch or cannot be divided among the processes.
    """
    rank, processes = process
    if not 0 < batch_size <= len(indices):
        raise ValueError(f"batch_size={batch_size} must be between 1 and the {len(indices)} images to draw from.")
    if batch_size % processes:
        raise ValueError(f"batch_size={batch_size} cannot be divided among {processes} processes; use a multiple.")
    return grain.MapDataset.source(_Batches(np.asarray(indices, np.int32), batch_size, seed, shuffle, rank, processes))


@dataclass(frozen=True)
class _Batches:
    """A grain source whose elements are whole batches: grain's own shuffle and batch take 25 us per index."""

    indices: np.ndarray
    batch_size: int
    seed: int
    shuffle: bool
    rank: int
    processes: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        size = self.batch_size // self.processes
        first = step * self.batch_size + self.rank * size
        epoch, start = divmod(first, len(self.indices))
        part = self._epoch(epoch)[start : start + size]
        return np.concatenate([part, self._epoch(epoch + 1)[: size - len(part)]]) if len(part) < size else part.copy()

    def _epoch(self, epoch: int) -> np.ndarray:
        return self.indices[_permutation(len(self.indices), self.seed, epoch)] if self.shuffle else self.indices


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffle of an epoch, kept for its next batches; no two (seed, epoch) share their random numbers."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.setflags(write=False)
    return order


def chunk(batches: grain.MapDataset, start: int, length: int) -> np.ndarray:
    """The batches of steps start..start + length - 1, int32 (length, batch), for one dispatch."""
    return np.stack([batches[step] for step in range(start, start + length)])


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps after which each of `count` images was seen at least once: 391 for 50,000 images in batches of 128."""
    return -(-count // batch_size)


def evaluation_batches(count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All of `count` images in order, the last batch filled up with image 0, so that evaluation is exact.

    Args:
      count: of the images.
      batch_size: images per batch.

    Returns:
      Indices, int32 (n, batch_size), and valid, bool (n, batch_size): False where an index only fills up.
    """
    indices = np.arange(steps_per_epoch(count, batch_size) * batch_size, dtype=np.int32).reshape(-1, batch_size)
    valid = indices < count
    return np.where(valid, indices, np.int32(0)), valid


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32) -> jax.Array:
    """Maps uint8 images (N, H, W, C) to (images / 255 - mean) / std, computed in float32, of type `dtype`.

    Args:
      images: uint8 (N, H, W, C).
      mean: C values in units of [0, 1].
      std: C values in units of [0, 1].
      dtype: of the result.

    Returns:
      (N, H, W, C).
    """
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def augment(rng: jax.Array, images: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Crops each image at random from its zero-padded self and mirrors half of them, every image independently.

    Rows and columns are picked by products with 0/1 matrices, which XLA runs faster than a gather on CPU and which are
    exact at any matrix precision, because bytes fit into bfloat16. The padding is a row or column of zeros in them.

    Args:
      rng: JAX random key; the result is a pure function of it.
      images: uint8 (N, H, W, C).
      pad: zero pixels added on each side before the crop of H x W; 0 for no crop.
      flip: whether to mirror left and right with probability 1/2.

    Returns:
      uint8 (N, H, W, C).
    """
    count, height, width, _ = images.shape
    row_rng, column_rng, flip_rng = jax.random.split(rng, 3)
    rows = _crop(row_rng, count, height, pad)
    columns = _crop(column_rng, count, width, pad)
    if flip:
        mirrored = jax.random.bernoulli(flip_rng, shape=(count, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    pixels = images.astype(jnp.float32)
    pixels = jnp.einsum("nih,nhwc->niwc", jax.nn.one_hot(rows, height), pixels)
    pixels = jnp.einsum("njw,niwc->nijc", jax.nn.one_hot(columns, width), pixels)
    return pixels.astype(jnp.uint8)


def _crop(rng: jax.Array, count: int, size: int, pad: int) -> jax.Array:
    """Source coordinates (count, size) of `count` random crops; those outside 0..size - 1 are padding."""
    offset = jax.random.randint(rng, (count, 1), -pad, pad + 1)
    return offset + jnp.arange(size)[None]
