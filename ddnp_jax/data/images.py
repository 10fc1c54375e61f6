"""Labelled images, and their transfer to the devices: kept in device memory, or streamed from the host.

A batch is made in two steps: `read` makes the host's part, which is sent to the devices, and `batch` turns it into the
network's input on a device. Small data sets are kept on every device, and only indices are sent. Large data sets are
decoded and augmented on the host, ahead of their use, and their pixels are sent. The interface is the same for both.
"""

import abc
import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from ddnp_jax import parallel
from ddnp_jax.data import photos
from ddnp_jax.data.order import BatchIndices
from ddnp_jax.data.preprocessing import Preprocessing

# "image": an encoded image; "label": its class; "source": its name in messages, if it has one besides its index.
Record = Mapping[str, Any]


class Images(abc.ABC):
    """Labelled images, numbered from 0.

    Attributes:
      threads: Number of threads that read ahead; 0 if reading is free.
      levels: The largest value of a pixel, 255 or 65535; None for floating-point pixels, which are not normalized.
    """

    threads = 0
    levels: int | None = 255

    def __init__(self, preprocessing: Preprocessing) -> None:
        """Takes the normalization from `preprocessing`: mean and std per channel in units of [0, 1], and bgr."""
        self._mean, self._std = tuple(preprocessing.mean), tuple(preprocessing.std)
        self._bgr = preprocessing.bgr

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @functools.cached_property
    def on_devices(self) -> Any:
        """Arrays that every device holds permanently; the first argument of `batch`."""
        return parallel.replicate(self._resident())

    @abc.abstractmethod
    def read(self, indices: BatchIndices, seed: int | None) -> Any:
        """Makes the host's part of a batch.

        Args:
          indices: Indices (N,) of the images.
          seed: Random seed of the augmentation; None for no augmentation.

        Returns:
          A pytree of host arrays (N, ...), a pure function of the arguments.
        """

    def batch(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Makes the network's input; runs on a device.

        Args:
          on_devices: The attribute `on_devices` of this object.
          host_batch: The result of `read`, or a device's share of it.
          rng: Random key of the augmentation; None for no augmentation, as for `read`.

        Returns:
          Normalized images, float32 (N, H, W, C), and labels, int32 (N,).
        """
        images, labels = self._ordered_pixels(on_devices, host_batch, rng)
        return (images if self.levels is None else normalize(images, self._mean, self._std)), labels

    def first(self, count: int) -> jax.Array:
        """The first `count` images as returned by `batch`, without augmentation."""
        return self.batch(self._resident(), self._read_plain(np.arange(min(count, len(self)))), None)[0]

    def served(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input images of an exported network, which normalizes them itself (`Dataset.serving`).

        Args:
          indices: Indices (N,) of the images.

        Returns:
          Pixels (N, H, W, C), not augmented and in the network's channel order, and labels (N,).
        """
        pixels, labels = self._ordered_pixels(self._resident(), self._read_plain(indices), None)
        return np.asarray(pixels), np.asarray(labels)

    def _read_plain(self, indices: np.ndarray) -> Any:
        """Makes the host's part of a batch without augmentation."""
        return self.read(BatchIndices(indices.astype(np.int32), np.zeros(len(indices), np.int32)), None)

    def _ordered_pixels(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[Any, Any]:
        images, labels = self._pixels(on_devices, host_batch, rng)
        return (images[..., ::-1] if self._bgr else images), labels

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the images and labels; for streamed photographs, of their number and of a sample."""

    @abc.abstractmethod
    def _resident(self) -> Any:
        """The arrays of `on_devices`, on the host."""

    @abc.abstractmethod
    def _pixels(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The result of `batch` before the channel order and the normalization."""


class InMemory(Images):
    """Images of equal size that fit into the memory of every device; augmented there by zero-padded crops and flips.

    Attributes:
      images: Images (N, H, W, C): uint8 or uint16, which are normalized, or float32, which are not.
      labels: Labels (N,), int32.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, preprocessing: Preprocessing) -> None:
        """Takes arrays on the host, and mean, std, bgr, pad and flip from `preprocessing`."""
        super().__init__(preprocessing)
        self.images, self.labels = images, labels
        self.levels = None if images.dtype.kind == "f" else int(np.iinfo(images.dtype).max)
        self._pad, self._flip = preprocessing.pad, preprocessing.flip

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: BatchIndices, seed: int | None) -> np.ndarray:
        """Returns only the indices of the images."""
        del seed  # the images are augmented on the devices
        return indices.image

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels."""
        found = hashlib.sha256()
        for array in (self.images, self.labels):
            found.update(f"{array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def _resident(self) -> tuple[np.ndarray, np.ndarray]:
        return self.images, self.labels

    def _pixels(self, on_devices: Any, host_batch: jax.Array, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        images, labels = (x[host_batch] for x in on_devices)
        return (images if rng is None else augment(rng, images, self._pad, self._flip)), labels


class Streamed(Images):
    """Encoded photographs of any size and number, decoded on the host by threads (decoders release the GIL).

    An augmented image is a pure function of (seed, epoch, index), the same in every batch and every process.
    """

    def __init__(self, records: Sequence[Record], preprocessing: Preprocessing) -> None:
        """Takes the records of encoded images.

        Args:
          records: Records with random access; they are accessed by several threads.
          preprocessing: Preprocessing, of which `pad` is not used; with a single mean, images are converted to grey.
        """
        super().__init__(preprocessing)
        self._records = records
        self._shape = preprocessing.crop_size, preprocessing.crop_size, len(preprocessing.mean)
        self._resize, self._flip = preprocessing.resize_size, preprocessing.flip
        # A scheduler may restrict the process to some of the cores.
        self.threads = preprocessing.threads or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: BatchIndices, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pixels, uint8, and the labels.

        Raises:
          ValueError: An image cannot be decoded.
        """
        images = np.empty((len(indices.image), *self._shape), np.uint8)
        labels = np.empty(len(indices.image), np.int32)
        for i, (index, epoch) in enumerate(zip(*map(np.ndarray.tolist, indices), strict=True)):
            record = self._records[index]
            labels[i] = record["label"]
            with naming(record, index):
                if seed is None:
                    photos.center_crop(record["image"], self._resize, out=images[i])
                else:
                    # The shuffles use (seed, epoch), which numpy treats like (seed, epoch, 0).
                    rng = np.random.default_rng((seed, epoch, 1 + index))
                    photos.random_crop(record["image"], rng, self._flip, out=images[i])
        return images, labels

    def fingerprint(self) -> str:
        """SHA-256 of the number of photographs, and of up to 16 of them and their labels."""
        count = len(self._records)
        found = hashlib.sha256(str(count).encode())
        for index in np.unique(np.linspace(0, count - 1, 16).astype(int)).tolist():
            record = self._records[index]
            found.update(f"{index} {record['label']}".encode() + record["image"])
        return found.hexdigest()

    def _resident(self) -> tuple[()]:
        return ()

    def _pixels(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        del on_devices, rng  # the images were augmented by `read`
        return host_batch


@contextlib.contextmanager
def naming(record: Record, index: int | None = None) -> Iterator[None]:
    """Adds the name of the record to an error of the decoder.

    Raises:
      ValueError: The record is damaged.
    """
    try:
        yield
    except ValueError as error:
        source = record.get("source", f"record {index} of the data set")
        raise ValueError(f"{source} cannot be decoded ({error}); repair or remove it.") from error


@contextlib.contextmanager
def read_ahead(
    batches: grain.MapDataset, read: Callable[[Any], Any], threads: int, length: int
) -> Iterator[Iterator[Any]]:
    """Reads batches ahead of their use, and stacks them in chunks of `length` batches for one dispatch.

    Args:
      batches: The images of each batch, from `order.batches` or `order.evaluation_batches`.
      read: Makes the host's part of a batch, a pytree of arrays, from an element of `batches`.
      threads: Number of threads that call `read` ahead of use, each for another batch; 0 to call it only when a chunk
        is requested.
      length: Number of batches per chunk; the last chunk may have fewer.

    Yields:
      An iterator over the chunks, pytrees of arrays (length, ...), in order. Leaving the context ends the threads.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + length if threads else 0)
    with contextlib.closing(iter(batches.map(read).to_iter_dataset(options).batch(length))) as chunks:
        yield chunks


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps images of 8 or 16 bits to (images / levels - mean) / std, in float32.

    Args:
      images: Images (N, H, W, C): uint8 with 255 levels, or uint16 with 65535.
      mean: Mean per channel, in units of [0, 1].
      std: Standard deviation per channel, in units of [0, 1].

    Returns:
      Normalized images (N, H, W, C).
    """
    center, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return (images.astype(jnp.float32) / jnp.iinfo(images.dtype).max - center) / scale


def augment(rng: jax.Array, images: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Randomly crops each zero-padded image and flips half of them horizontally, every image independently.

    Rows and columns are selected by products with 0/1 matrices, in which rows of zeros stand for the padding. On CPU
    this is faster than a gather. It is exact for bytes at any matrix precision, because bytes fit into bfloat16, and
    for other types at the highest precision.

    Args:
      rng: JAX random key.
      images: Images (N, H, W, C), uint8, uint16 or float32.
      pad: Zero padding in pixels on each side before the crop of H x W; 0 for no crop.
      flip: Whether to flip each image horizontally with probability 1/2.

    Returns:
      Augmented images (N, H, W, C), of the type of `images`.
    """
    count, height, width, _ = images.shape
    row_rng, column_rng, flip_rng = jax.random.split(rng, 3)
    rows = _crop(row_rng, count, height, pad)
    columns = _crop(column_rng, count, width, pad)
    if flip:
        mirrored = jax.random.bernoulli(flip_rng, shape=(count, 1))
        columns = jnp.where(mirrored, columns[:, ::-1], columns)
    precision = None if images.dtype == jnp.uint8 else jax.lax.Precision.HIGHEST
    pixels = images.astype(jnp.float32)
    pixels = jnp.einsum("nih,nhwc->niwc", jax.nn.one_hot(rows, height), pixels, precision=precision)
    pixels = jnp.einsum("njw,niwc->nijc", jax.nn.one_hot(columns, width), pixels, precision=precision)
    return pixels.astype(images.dtype)


def _crop(rng: jax.Array, count: int, size: int, pad: int) -> jax.Array:
    """Source coordinates (count, size) of `count` random crops; those outside 0..size - 1 are padding."""
    offset = jax.random.randint(rng, (count, 1), -pad, pad + 1)
    return offset + jnp.arange(size)[None]
