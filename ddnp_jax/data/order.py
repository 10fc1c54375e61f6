"""The order of images: held-out splits, shuffled batches, evaluation batches. Indices only, no pixels.

A batch is a pure function of (seed, step), so a run resumes from its step alone and every process computes its own
part.
"""

import functools
import sys
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np


class BatchIndices(NamedTuple):
    """The images of a batch.

    Attributes:
      image: Indices of the images, int32 (...).
      epoch: How many times each image was used before, int32 (...).
    """

    image: np.ndarray
    epoch: np.ndarray


def split(count: int, seed: int, search_fraction: float, validation_fraction: float) -> dict[str, np.ndarray]:
    """Divides `count` training images at random into three disjoint parts that together hold each image once.

    The search part depends on neither of the other two, so changing `validation_fraction` keeps it.

    Args:
      count: Number of training images.
      seed: Random seed of the split.
      search_fraction: Fraction of them for the search (DDNP: 5 % on CIFAR-10).
      validation_fraction: Fraction of them for selecting the best checkpoint.

    Returns:
      "train", "search" and "validation" -> sorted int32 indices.
    """
    order = np.random.default_rng(seed).permutation(count).astype(np.int32)
    search = round(search_fraction * count)
    validation = search + round(validation_fraction * count)
    parts = {"train": order[validation:], "search": order[:search], "validation": order[search:validation]}
    return {name: np.sort(part) for name, part in parts.items()}


def batches(indices: np.ndarray, batch_size: int, seed: int, *, process: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """The endless sequence of training batches, with random access by step.

    The epochs follow one another without a gap, each a new global shuffle of all indices, and the sequence is cut into
    batches: nothing is dropped, and a batch may span two epochs. The sequence of global batches does not depend on the
    number of processes; each process gets its consecutive part of every one.

    Args:
      indices: int (N,), the images to use, each once per epoch.
      batch_size: Images in the global batch, over all processes; at most N.
      seed: Seed of the shuffles.
      process: The rank of this process and the number of processes.

    Returns:
      Element `step` is this process' part of the batch: `BatchIndices` (batch_size / processes,), a pure function of
      (seed, step).

    Raises:
      ValueError: The batch is larger than an epoch or cannot be divided among the processes.
    """
    rank, processes = process
    if not 0 < batch_size <= len(indices):
        raise ValueError(f"batch_size={batch_size} must be between 1 and the {len(indices)} images to draw from.")
    if batch_size % processes:
        raise ValueError(f"batch_size={batch_size} cannot be divided among {processes} processes; use a multiple.")
    return grain.MapDataset.source(_Batches(np.asarray(indices, np.int32), batch_size, seed, rank, processes))


@dataclass(frozen=True)
class _Batches:
    """A grain source whose elements are whole batches, because grain's own shuffle and batch take 25 us per index."""

    indices: np.ndarray
    batch_size: int
    seed: int
    rank: int
    processes: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> BatchIndices:
        size = self.batch_size // self.processes
        first = step * self.batch_size + self.rank * size
        epoch, start = divmod(first, len(self.indices))
        index = self._epoch(epoch)[start : start + size]
        missing = size - len(index)
        if missing:
            index = np.concatenate([index, self._epoch(epoch + 1)[:missing]])
        return BatchIndices(index.copy(), np.repeat(np.array([epoch, epoch + 1], np.int32), [size - missing, missing]))

    def _epoch(self, epoch: int) -> np.ndarray:
        return self.indices[_permutation(len(self.indices), self.seed, epoch)]


@functools.lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffle of an epoch, cached for its next batches; the random numbers differ between all (seed, epoch)."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.setflags(write=False)
    return order


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Steps after which each of `count` images was seen at least once: 391 for 50,000 images in batches of 128."""
    return -(-count // batch_size)


def evaluation_batches(indices: np.ndarray, batch_size: int, *, process: tuple[int, int] = (0, 1)) -> grain.MapDataset:
    """All images once and in order; the last batch is padded with the first image.

    Args:
      indices: int (N,), the images to evaluate.
      batch_size: Images in the global batch, over all processes; a multiple of their number.
      process: The rank of this process and the number of processes.

    Returns:
      Elements are this process' part of the batches: `BatchIndices` (batch_size / processes,), and `valid`, bool of the
      same shape, which is False for the padding and must exclude it from the evaluation.
    """
    rank, processes = process
    count = steps_per_epoch(len(indices), batch_size) * batch_size
    valid = np.arange(count) < len(indices)
    filled = np.concatenate([indices, np.repeat(indices[:1], count - len(indices))]).astype(np.int32)
    parts = [a.reshape(-1, processes, batch_size // processes)[:, rank] for a in (filled, valid)]
    batches = [(BatchIndices(index, np.zeros_like(index)), real) for index, real in zip(*parts, strict=True)]
    return grain.MapDataset.source(batches)
