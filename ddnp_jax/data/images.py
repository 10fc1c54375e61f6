"""Indexed images, and how batches reach the devices: from device memory, or streamed from the host.

A batch travels in two halves: `read` makes the host's part of it, which is sent to the devices, and `batch` makes of
that, on a device, what the network sees. Small data sets lie on every device, and only indices are sent; large ones are
decoded and augmented on the host, ahead of their use, and their pixels are sent. Nobody else knows which.
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

# "image": an encoded image; "label": its class; "source": what messages call it, where that is more than its number.
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
        """Sets the normalization: mean and std per channel in units of [0, 1], and bgr."""
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
          indices: (N,), which images.
          seed: Seed of the augmentation; None for none.

        Returns:
          A pytree of host arrays (N, ...), a pure function of the arguments.
        """

    def batch(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Makes a batch as the network sees it; runs on a device.

        Args:
          on_devices: This object's `on_devices`.
          host_batch: What `read` made, or a device's share of it.
          rng: Random key of the augmentation; None for none, as in `read`.

        Returns:
          Normalized images, float32 (N, H, W, C), and labels, int32 (N,).
        """
        images, labels = self._ordered_pixels(on_devices, host_batch, rng)
        return (images if self.levels is None else normalize(images, self._mean, self._std)), labels

    def first(self, count: int) -> jax.Array:
        """The first `count` images as `batch` gives them, without augmentation."""
        return self.batch(self._resident(), self._read_plain(np.arange(min(count, len(self)))), None)[0]

    def served(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images as they come to an exported network, which normalizes them itself (`Dataset.serving`).

        Args:
          indices: (N,), which images.

        Returns:
          Pixels (N, H, W, C), not augmented and in the network's order of channels, and labels (N,).
        """
        pixels, labels = self._ordered_pixels(self._resident(), self._read_plain(indices), None)
        return np.asarray(pixels), np.asarray(labels)

    def _read_plain(self, indices: np.ndarray) -> Any:
        """The host's part of a batch that is not augmented."""
        return self.read(BatchIndices(indices.astype(np.int32), np.zeros(len(indices), np.int32)), None)

    def _ordered_pixels(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[Any, Any]:
        images, labels = self._pixels(on_devices, host_batch, rng)
        return (images[..., ::-1] if self._bgr else images), labels

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the images and labels; of many photographs, of their number and of some."""

    @abc.abstractmethod
    def _resident(self) -> Any:
        """`on_devices`, on the host."""

    @abc.abstractmethod
    def _pixels(self, on_devices: Any, host_batch: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """`batch` before the normalization."""


class InMemory(Images):
    """Images of equal size that fit into the memory of every device; augmented there by zero-padded crops and flips.

    Attributes:
      images: uint8 or uint16 (N, H, W, C), which are normalized, or float32, which are not.
      labels: int32 (N,).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, preprocessing: Preprocessing) -> None:
        """Takes arrays on the host; of `preprocessing`, mean, std, bgr, pad and flip count."""
        super().__init__(preprocessing)
        self.images, self.labels = images, labels
        self.levels = None if images.dtype.kind == "f" else int(np.iinfo(images.dtype).max)
        self._pad, self._flip = preprocessing.pad, preprocessing.flip

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: BatchIndices, seed: int | None) -> np.ndarray:
        """Returns only the indices of the images."""
        del seed  # the devices augment
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

    An augmented image is a pure function of (seed, epoch, index): it depends neither on the batch nor on the process
    that uses it.
    """

    def __init__(self, records: Sequence[Record], preprocessing: Preprocessing) -> None:
        """Takes the records of encoded images.

        Args:
          records: Records with random access, from several threads.
          preprocessing: Mean, std, bgr, flip, crop_size, resize_size and threads count; one mean is a grey image's.
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
        """The pixels, uint8, and labels.

        Raises:
          ValueError: A record holds no image that can be decoded.
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
                    rng = np.random.default_rng((seed, epoch, 1 + index))  # (seed, epoch, 0) is (seed, epoch)
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
        del on_devices, rng  # `read` has augmented
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
    """The host's parts of batch after batch, `length` of them stacked for one dispatch.

    Args:
      batches: Which images; of `order.batches` or `order.evaluation_batches`.
      read: Makes the host's part, a pytree of arrays, of an element of `batches`.
      threads: How many threads call `read` ahead of use, each for another batch; 0 to call it when a chunk is asked
        for.
      length: Batches per chunk; the last chunk holds what remains.

    Yields:
      An iterator of pytrees of arrays (length, ...), in order. Leaving the context ends the threads.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + length if threads else 0)
    with contextlib.closing(iter(batches.map(read).to_iter_dataset(options).batch(length))) as chunks:
        yield chunks


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32) -> jax.Array:
    """Maps images of 8 or 16 bits to (images / levels - mean) / std, computed in float32.

    Args:
      images: uint8 (N, H, W, C), of 255 levels, or uint16, of 65535.
      mean: C values in units of [0, 1].
      std: C values in units of [0, 1].
      dtype: The data type of the result.

    Returns:
      (N, H, W, C).
    """
    center, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return ((images.astype(jnp.float32) / jnp.iinfo(images.dtype).max - center) / scale).astype(dtype)


def augment(rng: jax.Array, images: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Randomly crops each zero-padded image and flips half of them horizontally, every image independently.

    Rows and columns are picked by products with 0/1 matrices, which XLA runs faster than a gather on CPU and which are
    exact for bytes at any matrix precision, because bytes fit into bfloat16, and for others at the highest. The padding
    is a row or column of zeros in them.

    Args:
      rng: JAX random key; the result is a pure function of it.
      images: uint8, uint16 or float32 (N, H, W, C).
      pad: Zero pixels added on each side before the crop of H x W; 0 for no crop.
      flip: Whether to mirror left and right with probability 1/2.

    Returns:
      (N, H, W, C), of the type of `images`.
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
