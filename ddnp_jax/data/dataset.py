"""A data set: its images, its held-out splits, and the preprocessing that a deployed network needs."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ddnp_jax.config import DataConfig, Stage
from ddnp_jax.data import photos
from ddnp_jax.data.images import Images, InMemory, Record, Streamed, naming
from ddnp_jax.data.order import split
from ddnp_jax.data.preprocessing import Preprocessing
from ddnp_jax.fields import check_limits

SMALL_SIDE = 96  # pixels; images of equal size up to this are kept in memory and not resized
MAX_BYTES = 2**31  # limit of the pixels that are kept in memory, and on every device


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
      name: Name of the data set in reports.
      num_classes: Number of classes; labels are 0..num_classes - 1.
      image_shape: Shape (H, W, C) of the network's input images.
      train: The training images, in record order.
      test: The test images, in record order.
      splits: "train", "search" and "validation" -> sorted int32 indices into `train`; a partition of it.
      preprocessing: Preprocessing of the network's input.
      class_names: Names of the classes by label; None if there are none.
      notes: Remarks to include in reports.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    train: Images
    test: Images
    splits: dict[str, np.ndarray]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises if a label is out of range, or the number of class names does not match."""
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.num_classes} classes.")
        for part in ("train", "test"):
            images = getattr(self, part)
            if isinstance(images, InMemory):
                check_labels(images.labels, self.num_classes, part)

    def indices(self, stage: Stage) -> np.ndarray:
        """Returns the training images of a stage: base training excludes those of the search, fine-tuning does not."""
        if stage == "search":
            return self.splits["search"]
        train = self.splits["train"]
        return train if stage == "base" else np.sort(np.concatenate([train, self.splits["search"]]))

    def fingerprint(self) -> dict[str, Any]:
        """Returns the data set's identity as JSON values: contents, splits and preprocessing."""
        preprocessing = dataclasses.asdict(self.preprocessing)
        del preprocessing["threads"]
        return {
            "classes": [self.num_classes, list(self.class_names or ())],
            "train": self.train.fingerprint(),
            "test": self.test.fingerprint(),
            "splits": {name: hashlib.sha256(part.tobytes()).hexdigest() for name, part in self.splits.items()},
            "preprocessing": preprocessing,
        }

    def serving(self) -> dict[str, Any]:
        """Returns the preprocessing of the network's input, as JSON values.

        Returns:
          "input_shape": [H, W, C]. "channel_order": "rgb" (assumed for arrays of 3 channels), "bgr" or "grey"; None for
          other numbers of channels. "resize_size" and "crop_size": the shorter side to which a photograph is resized
          and the side of its square center crop; None if images are not cropped. "scale", "mean" and
          "std": the network's input is (scale * pixels - mean) / std, the last two per channel in "channel_order".
          "num_classes" and "class_names": the meaning of the outputs.
        """
        is_streamed = isinstance(self.train, Streamed)
        channels, levels = self.image_shape[-1], self.train.levels
        colors = "bgr" if self.preprocessing.bgr else "rgb"
        return {
            "input_shape": list(self.image_shape),
            "channel_order": colors if channels == 3 else "grey" if channels == 1 else None,
            "resize_size": self.preprocessing.resize_size if is_streamed else None,
            "crop_size": self.preprocessing.crop_size if is_streamed else None,
            "scale": 1 / levels if levels else 1.0,
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
        }


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out splits of the training images, with the fields of a configuration's `data` section.

    Attributes:
      seed: Random seed of the splits.
      search_fraction: Fraction of the training images for the search, held out from base training.
      validation_fraction: Fraction of the training images for selecting the best checkpoint.
    """

    seed: int
    search_fraction: float
    validation_fraction: float

    def check(self, section: str = "") -> None:
        """Checks the fields; arguments and errors as in `Preprocessing.check`."""
        check_limits(self, section, like=DataConfig)
        if self.search_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"{section}search_fraction={self.search_fraction} and "
                f"{section}validation_fraction={self.validation_fraction} leave no training images; "
                "their sum must be below 1."
            )

    def splits(self, count: int) -> dict[str, np.ndarray]:
        """The splits of `count` training images, as in `Dataset`."""
        return split(count, self.seed, self.search_fraction, self.validation_fraction)


def check_labels(labels: np.ndarray, num_classes: int, part: str) -> None:
    """Checks that labels are in 0..num_classes - 1.

    Args:
      labels: Whole numbers (N,).
      num_classes: The number of classes.
      part: "train" or "test", for the message.

    Raises:
      ValueError: A label is out of range; the message names the first one and its index.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"label {wrong[0]} of {part} is {labels[wrong[0]]}; with {num_classes} classes it must be "
            f"from 0 to {num_classes - 1}."
        )


def open_images(
    train: Sequence[Record], test: Sequence[Record], preprocessing: Preprocessing, *, may_fit: bool = True
) -> tuple[Images, Images, tuple[int, int, int]]:
    """Reads encoded images into memory if all are small and of equal size; otherwise they are streamed.

    Args:
      train: The training images.
      test: The test images.
      preprocessing: Preprocessing of the network's input; its means determine the number of channels.
      may_fit: False if the sizes are known to differ.

    Returns:
      Training and test images, and their shape (H, W, C) as the network sees it.
    """
    channels = len(preprocessing.mean)
    read = _read_small(train, channels) if may_fit else None
    tested = _read_small(test, channels) if read is not None else None
    if read is None or tested is None or read[0].shape[1:] != tested[0].shape[1:]:
        size = preprocessing.crop_size
        return Streamed(train, preprocessing), Streamed(test, preprocessing), (size, size, channels)
    return InMemory(*read, preprocessing), InMemory(*tested, preprocessing), read[0].shape[1:]


def _read_small(records: Sequence[Record], channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns all images, uint8 (N, H, W, C), and labels, int32 (N,); None if images are large or differ in size."""
    images, labels = np.empty(0, np.uint8), np.empty(len(records), np.int32)
    for i, record in enumerate(tqdm(records, desc="reading images", unit="image", delay=1)):
        with naming(record, i):
            image = photos.decode(record["image"], channels=channels)
        if i == 0:
            if max(image.shape) > SMALL_SIDE or image.nbytes * len(records) > MAX_BYTES:
                return None
            images = np.empty((len(records), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            return None
        images[i], labels[i] = image, record["label"]
    return images, labels
