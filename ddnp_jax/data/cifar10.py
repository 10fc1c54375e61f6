"""TFDS's CIFAR-10, downloaded and prepared without TensorFlow."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image

SHAPE = (32, 32, 3)


class Cifar10(
    tfds.image_classification.Cifar10,
    skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types
):
    """The data set of TFDS: its name, version, address, checksum, features and record order.

    Only the unpacking is replaced, because TFDS opens the archive and encodes the images with TensorFlow.
    """

    TEST_SPLIT = "test"  # its images give the reported accuracies
    url_infos = tfds.image_classification.Cifar10.url_infos  # the checksum, which TFDS would look for beside this file

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        source = self._cifar_info
        try:  # TFDS retries for minutes if there is no network connection
            requests.head(source.url, timeout=20)
        except requests.RequestException as error:
            raise ConnectionError(f"{source.url} did not answer: {type(error).__name__}") from error
        with tarfile.open(dl_manager.download(source.url)) as archive:
            opened = ((member.name, archive.extractfile(member)) for member in archive if member.isfile())
            files = {PurePosixPath(name).name: file.read() for name, file in opened if file is not None}
        self.info.features["label"].names = files[source.label_files[0]].decode().split()
        return {
            "train": self._generate_examples("train", b"".join(files[name] for name in source.train_files)),
            "test": self._generate_examples("test", b"".join(files[name] for name in source.test_files)),
        }

    def _generate_examples(self, split: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the images of the binary format: for every image a label byte, then the planes R, G, B by rows."""
        height, width, planes = SHAPE
        records = np.frombuffer(data, np.uint8).reshape(-1, 1 + height * width * planes)
        images = records[:, 1:].reshape(-1, planes, height, width).transpose(0, 2, 3, 1)
        for i, (pixels, label) in enumerate(zip(images, records[:, 0], strict=True)):
            # A PIL image, because TFDS encodes arrays with TensorFlow.
            image = Image.fromarray(np.ascontiguousarray(pixels))
            yield i, {"id": f"{split}_{i:05d}", "image": image, "label": int(label)}
