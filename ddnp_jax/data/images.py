"""Images under numbers, and how a batch of them comes to the devices: from there, or from the host in a stream.

A batch travels in two halves: `read` makes on the host what is sent to the devices, and `batch` makes on a device
normalized pixels of it. Small data sets lie on every device as uint8, and only indices are sent; large ones are decoded
and augmented on the host, ahead of their use, and their pixels are sent. Nobody else knows which.
"""

import abc
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ddnp_jax import parallel
from ddnp_jax.data import photos
from ddnp_jax.data.order import Draws


class Images(abc.ABC):
    """Labelled images, numbered from 0.

    Attributes:
      threads: read ahead; 0 where reading costs nothing.
    """

    threads = 0

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        """Sets the normalization of the `data` section: mean and std per channel in units of [0, 1], and bgr."""
        self._mean, self._std, self._bgr = tuple(config.mean), tuple(config.std), config.bgr

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @functools.cached_property
    def on_devices(self) -> Any:
        """What every device holds all the time; the first argument of `batch`."""
        return parallel.replicate(self._resident())

    @abc.abstractmethod
    def read(self, draws: Draws, seed: int | None) -> Any:
        """What is sent to the devices for a batch.

        Args:
          draws: (N,), the images.
          seed: of the augmentation; None for none.

        Returns:
          A pytree of host arrays (N, ...), a pure function of the arguments.
        """

    def batch(self, on_devices: Any, sent: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Makes the batch of what was sent; runs on a device.

        Args:
          on_devices: of this object.
          sent: by `read`; or a device's share of it.
          rng: random key of the augmentation; None for none, as in `read`.

        Returns:
          Normalized images, float32 (N, H, W, C), and labels, int32 (N,).
        """
        images, labels = self._pixels(on_devices, sent, rng)
        images = images[..., ::-1] if self._bgr else images
        return normalize(images, self._mean, self._std), labels

    def first(self, count: int) -> jax.Array:
        """The first `count` images as `batch` gives them, without augmentation."""
        index = np.arange(min(count, len(self)), dtype=np.int32)
        return self.batch(self._resident(), self.read(Draws(index, np.zeros_like(index)), None), None)[0]

    @abc.abstractmethod
    def _resident(self) -> Any:
        """`on_devices`, on the host."""

    @abc.abstractmethod
    def _pixels(self, on_devices: Any, sent: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """`batch` before the normalization: uint8."""


class InMemory(Images):
    """Images of one size, few enough to lie on every device; augmented there by zero-padded crops and flips.

    Attributes:
      images: uint8 (N, H, W, C).
      labels: int32 (N,).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, config: ml_collections.ConfigDict) -> None:
        """Takes arrays on the host; `config` is the `data` section: mean, std, pad and flip."""
        super().__init__(config)
        self.images, self.labels = images, labels
        self._pad, self._flip = config.pad, config.flip

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, draws: Draws, seed: int | None) -> np.ndarray:
        """Only the indices."""
        del seed  # the devices augment
        return draws.index

    def _resident(self) -> tuple[np.ndarray, np.ndarray]:
        return self.images, self.labels

    def _pixels(self, on_devices: Any, sent: jax.Array, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        images, labels = (x[sent] for x in on_devices)
        return (images if rng is None else augment(rng, images, self._pad, self._flip)), labels


class Streamed(Images):
    """Encoded photographs of any size and number, decoded on the host by threads (decoders release the GIL).

    An augmented image is a pure function of (seed, epoch, index): it depends neither on the batch nor on the process
    that it is drawn in.
    """

    def __init__(self, records: Sequence[dict[str, Any]], config: ml_collections.ConfigDict) -> None:
        """Takes records with an encoded "image" and a "label".

        Args:
          records: with random access, from several threads.
          config: the `data` section: mean, std, flip, crop_size, resize_size and threads.
        """
        super().__init__(config)
        self._records = records
        self._size, self._resize, self._flip = config.crop_size, config.resize_size, config.flip
        # Where a scheduler gives the process some of the cores, these are what it may use.
        self.threads = config.threads or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, draws: Draws, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The pixels, uint8, and labels.

        Raises:
          ValueError: a record holds no image that can be decoded.
        """
        images = np.empty((len(draws.index), self._size, self._size, 3), np.uint8)
        labels = np.empty(len(draws.index), np.int32)
        for i, (index, epoch) in enumerate(zip(*map(np.ndarray.tolist, draws), strict=True)):
            record = self._records[index]
            labels[i] = record["label"]
            try:
                if seed is None:
                    photos.center_crop(record["image"], self._resize, out=images[i])
                else:
                    rng = np.random.default_rng((seed, epoch, 1 + index))  # (seed, epoch, 0) is (seed, epoch)
                    photos.random_crop(record["image"], rng, self._flip, out=images[i])
            except (ValueError, OSError) as error:
                raise ValueError(f"record {index} of the data set cannot be decoded ({error}); repair it.") from error
        return images, labels

    def _resident(self) -> tuple[()]:
        return ()

    def _pixels(self, on_devices: Any, sent: Any, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        del on_devices, rng  # `read` has augmented
        return sent


@contextlib.contextmanager
def read_ahead(
    batches: grain.MapDataset, read: Callable[[Any], Any], threads: int, length: int
) -> Iterator[Iterator[Any]]:
    """What is sent for batch after batch, `length` of them stacked for one dispatch.

    Args:
      batches: of draws.
      read: makes of an element what is sent, a pytree of arrays.
      threads: call `read` ahead of use, each for another batch; 0 to call it when a chunk is asked for.
      length: batches per chunk; the last chunk holds what remains.

    Yields:
      An iterator of pytrees of arrays (length, ...), in order. Leaving the context ends the threads.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + length if threads else 0)
    with contextlib.closing(iter(batches.map(read).to_iter_dataset(options).batch(length))) as chunks:
        yield chunks


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
