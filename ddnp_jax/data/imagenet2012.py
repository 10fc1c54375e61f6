"""TFDS's ImageNet (ILSVRC 2012), opened and prepared without TensorFlow."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds

TRAIN_ARCHIVE, VALIDATION_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


class Imagenet2012(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # TFDS has no types
):
    """1,281,167 training and 50,000 validation photographs in 1,000 classes, with TFDS's names, labels and features.

    Files are stored without changes. TFDS converts the 22 CMYK files and the PNG file during preparation; this library
    converts them when it reads them.
    """

    TEST_SPLIT = "validation"  # TFDS's test split has no labels
    VERSION = tfds.core.Version("5.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"{TRAIN_ARCHIVE} and {VALIDATION_ARCHIVE} from https://image-net.org/download-images"
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="ILSVRC 2012.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names_file=_tfds_file("labels.txt")),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org/",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        try:
            folder = Path(dl_manager.manual_dir)
        except AssertionError as error:  # raised by TFDS if the folder is missing
            raise FileNotFoundError(" ".join(str(error).split())) from error
        for name in (TRAIN_ARCHIVE, VALIDATION_ARCHIVE):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / name} is missing; get it from {self.info.homepage}")
        return {
            "train": self._generate_examples(_train_files(folder / TRAIN_ARCHIVE)),
            "validation": self._generate_examples(_validation_files(folder / VALIDATION_ARCHIVE)),
        }

    def _generate_examples(self, files: Iterator[tuple[str, IO[bytes], str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, file, label in files:
            yield name, {"file_name": name, "image": file.read(), "label": label}


def _train_files(path: Path) -> Iterator[tuple[str, IO[bytes], str]]:
    """Yields names, files and labels; the archive contains an archive per class, named by its WordNet id."""
    with tarfile.open(path) as archive:
        for archive_name, class_file in _files(archive):
            with tarfile.open(fileobj=class_file) as class_archive:
                for name, file in _files(class_archive):
                    yield name, file, archive_name.removesuffix(".tar")


def _validation_files(path: Path) -> Iterator[tuple[str, IO[bytes], str]]:
    """Yields names, files and labels; the labels of TFDS are in the alphabetical order of the files."""
    labels = Path(_tfds_file("validation_labels.txt")).read_text().split()
    with tarfile.open(path) as archive:
        label_of = dict(zip(sorted(name for name, _ in _files(archive)), labels, strict=True))
        for name, file in _files(archive):
            yield name, file, label_of[name]


def _tfds_file(name: str) -> str:
    return str(tfds.core.tfds_path(f"datasets/imagenet2012/{name}"))


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is not None:
            yield Path(member.name).name, file
