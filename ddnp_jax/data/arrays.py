"""Data sets from arrays in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddnp_jax.data.dataset import Dataset, HeldOut, check_labels
from ddnp_jax.data.images import InMemory
from ddnp_jax.data.preprocessing import Preprocessing
from ddnp_jax.networks import layout_note

_BLOCK = 1000  # images per block when computing statistics

FLOAT_NOTE = "The images are floating-point arrays; the network sees them as they are, without normalization."


def from_arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pad: int = 4,
    flip: bool = True,
    seed: int = 0,
    search_fraction: float = 0.05,
    validation_fraction: float = 0.02,
) -> Dataset:
    """Creates a data set from images and labels in memory; it must fit into the memory of every device.

    Images of 8 or 16 bits are scaled to [0, 1] and normalized. Floating-point images are used unchanged, in float32.

    Args:
      train: The training images, uint8, uint16 or floating-point (N, H, W, C) or (N, H, W), and their labels, whole
        numbers (N,) from 0.
      test: The test images, of the same type and shape, and their labels.
      class_names: Name of each class; None to derive the number of classes from the largest training label.
      name: Name of the data set in reports.
      mean: Mean per channel for normalization, in units of [0, 1]; None for that of the training images.
      std: Standard deviation per channel, likewise.
      pad: Zero padding in pixels on each side before a random crop, in stages with augmentation.
      flip: Whether to flip half of the images horizontally, in stages with augmentation.
      seed: Random seed of the held-out splits.
      search_fraction: Fraction of the training images for the search, held out from base training.
      validation_fraction: Fraction of the training images for selecting the best checkpoint.

    Returns:
      The data set.

    Raises:
      ValueError: An argument is invalid; the message names the index of an invalid image or label.
    """
    held_out = HeldOut(seed, search_fraction, validation_fraction)
    held_out.check()
    parts = {"train": train, "test": test}
    images = {part: _images(given, part) for part, (given, _) in parts.items()}
    _check_same(images["train"], images["test"])
    labels = {part: _labels(given, len(images[part]), part) for part, (_, given) in parts.items()}
    num_classes = int(labels["train"].max()) + 1 if class_names is None else len(class_names)
    for part in parts:
        check_labels(labels[part], num_classes, part)
    preprocessing = _preprocessing(images["train"], mean, std, pad, flip)
    preprocessing.check(name, images["train"].shape[-1])
    read = {part: InMemory(images[part], labels[part].astype(np.int32), preprocessing) for part in parts}
    return Dataset(
        name=name,
        num_classes=num_classes,
        image_shape=images["train"].shape[1:],
        splits=held_out.splits(len(images["train"])),
        preprocessing=preprocessing,
        class_names=None if class_names is None else tuple(map(str, class_names)),
        notes=(FLOAT_NOTE,) if read["train"].levels is None else (),
        **read,
    )


def _images(given: Any, part: str) -> np.ndarray:
    """Converts images to (N, H, W, C), uint8, uint16 or finite float32."""
    images = _array(given, part)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not images.size:
        raise ValueError(f"the images of {part} have shape {np.shape(given)}; give (N, H, W, C) or (N, H, W).")
    # Only square images: an image of 3 rows with as many columns as channels is none, but sensor data have few rows.
    if images.shape[2] == images.shape[3] and (note := layout_note(images.shape)):
        raise ValueError(f"the images of {part} have shape {images.shape}{note}")
    if images.dtype in (np.uint8, np.uint16):
        return images
    if images.dtype.kind != "f":
        raise ValueError(
            f"the images of {part} are of type {images.dtype}; give uint8 (0..255), uint16 (0..65535), or "
            "floating-point numbers, which are taken as they are."
        )
    with np.errstate(over="ignore"):
        images = images.astype(np.float32, copy=False)
    wrong = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if len(wrong):
        raise ValueError(
            f"image {wrong[0]} of {part} has a pixel that is not finite in float32; repair or remove the image."
        )
    return images


def _array(given: Any, part: str) -> np.ndarray:
    """Converts images to an array of numbers; raises if they differ in size."""
    is_array = hasattr(given, "shape")
    is_objects = is_array and given.dtype == np.dtype(object)
    shapes = [np.shape(image) for image in given] if is_objects or not is_array else []
    differing = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if differing is not None:
        raise ValueError(
            f"image {differing} of {part} has shape {shapes[differing]}, and image 0 {shapes[0]}; give images of one "
            "size, or use from_folder."
        )
    if is_objects:
        raise ValueError(f"the images of {part} are an array of Python objects; stack the images with np.stack.")
    return np.asarray(given)


def _labels(given: Any, count: int, part: str) -> np.ndarray:
    """Converts labels to an array of nonnegative integers (count,)."""
    labels = np.asarray(given)
    if labels.ndim == 2:
        raise ValueError(
            f"the labels of {part} have shape {labels.shape}, as one-hot labels do; give the number of each image's "
            "class, labels.argmax(1)."
        )
    if labels.shape != (count,):
        raise ValueError(f"the labels of {part} have shape {labels.shape}; give one for each of its {count} images.")
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"the labels of {part} are of type {labels.dtype}, the first is {given[0]!r}; give whole numbers from 0."
        )
    if labels.min() < 0:
        raise ValueError(f"label {labels.argmin()} of {part} is {labels.min()}; give whole numbers from 0.")
    return labels


def _check_same(train: np.ndarray, test: np.ndarray) -> None:
    for what, ours, theirs in (("type", train.dtype, test.dtype), ("shape", train.shape[1:], test.shape[1:])):
        if ours != theirs:
            raise ValueError(f"the images of train have {what} {ours}, and those of test {theirs}; give the same.")


def _preprocessing(
    images: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None, pad: int, flip: bool
) -> Preprocessing:
    channels = images.shape[-1]
    if images.dtype == np.float32:
        if mean is not None or std is not None:
            raise ValueError("mean and std are for images of 8 or 16 bits; floating-point ones are taken as they are.")
        return Preprocessing((0.0,) * channels, (1.0,) * channels, pad=pad, flip=flip)
    own_mean, own_std = _statistics(images)
    return Preprocessing(own_mean if mean is None else mean, own_std if std is None else std, pad=pad, flip=flip)


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in units of [0, 1]."""
    sums, squares = np.zeros((2, images.shape[-1]))
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].astype(np.float64) / np.iinfo(images.dtype).max
        sums += block.sum((0, 1, 2))
        squares += np.square(block).sum((0, 1, 2))
    mean = sums / images[..., 0].size
    return mean.tolist(), np.sqrt(np.maximum(squares / images[..., 0].size - mean**2, 0)).tolist()
