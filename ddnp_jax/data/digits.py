"""Scikit-learn's scanned handwritten digits as a TFDS data set: real images that need no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SCALE = 2  # 8x8 scans are stored as 16x16 images, large enough for the three stages of a ResNet
TEST_EVERY = 5


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 scans of handwritten digits, 16x16 grey, in 10 classes: 1,442 train and 355 test images.

    Every pixel of the 8x8 scans is repeated 2 x 2 times, without a resampling filter, and the levels 0..16 are scaled
    to 0..255. Every fifth scan of a class, in the order of the source, is a test image. The source is ordered by
    writer, so both splits contain all writers. The records keep the order of the source.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998; `sklearn.datasets.load_digits`.
    """

    TEST_SPLIT = "test"  # its images give the reported accuracies
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Scikit-learn's 1,797 scanned handwritten digits, 8x8 pixels repeated to 16x16.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8 * SCALE, 8 * SCALE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits  # imported here, because only the preparation of the data needs it

        scans = load_digits()
        is_test = np.zeros(len(scans.target), bool)
        for label in range(10):
            is_test[np.flatnonzero(scans.target == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
        return {
            "train": self._generate_examples(scans.images[~is_test], scans.target[~is_test]),
            "test": self._generate_examples(scans.images[is_test], scans.target[is_test]),
        }

    def _generate_examples(self, scans: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        levels = np.round(scans * (255 / 16)).astype(np.uint8)
        for i, (image, label) in enumerate(zip(levels.repeat(SCALE, 1).repeat(SCALE, 2), labels, strict=True)):
            # A PIL image, because TFDS encodes arrays with TensorFlow.
            yield i, {"image": Image.fromarray(image), "label": int(label)}
