"""Scikit-learn's scanned handwritten digits as a TFDS data set: real images that need no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SCALE = 2  # 8x8 scans are stored as 16x16 images, so that three stages of a ResNet still have pixels to look at
TEST_EVERY = 5


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 scans of handwritten digits, 16x16 grey, in 10 classes: 1,442 train and 355 test images.

    The 8x8 scans with levels 0..16 are repeated 2 x 2 and spread over 0..255, so no resampling filter is involved.
    Every fifth scan of a class, in the order of the source, is a test image: writers follow one another there, so both
    splits see all of them. The records keep the order of the source.

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
        from sklearn.datasets import load_digits  # here, because only the first use of the data needs it

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
