"""Data sets from image files, with one folder per class."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from ddnp_jax.config import DataConfig
from ddnp_jax.data import photos
from ddnp_jax.data.dataset import Dataset, HeldOut, open_images
from ddnp_jax.data.images import Record, Streamed, naming
from ddnp_jax.data.preprocessing import Preprocessing
from ddnp_jax.fields import check_limits

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TEST_FOLDERS = ("test", "val", "valid", "validation")  # of test images, beside `train`; the first one found is used
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's


def from_folder(
    path: str | Path,
    *,
    name: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bgr: bool = False,
    pad: int = 4,
    flip: bool = True,
    crop_size: int = 224,
    resize_size: int = 256,
    threads: int = 0,
    test_fraction: float = 0.2,
    seed: int = 0,
    search_fraction: float = 0.05,
    validation_fraction: float = 0.02,
) -> Dataset:
    """Creates a data set from image files.

    The folder contains a sub-folder for each class, named after the class; or `train` and one of `test`, `val`, `valid`
    and `validation` with such sub-folders. Images may be nested deeper in a class's folder. Hidden files and folders
    are ignored, links are followed except in cycles, and other files are skipped, which is noted in the report. Small
    images of equal size are kept in memory and augmented by padded crops; others are streamed and cropped.

    Args:
      path: The folder.
      name: Name of the data set in reports; None for the folder's name.
      mean: Mean per channel for normalization, in units of [0, 1] and in the network's channel order; with a single
        value, images are converted to grayscale. None for those of ImageNet.
      std: Standard deviation per channel, likewise.
      bgr: Whether the network takes BGR images.
      pad: Zero padding in pixels on each side before the random crop of small images, in stages with augmentation.
      flip: Whether to flip half of the images horizontally, in stages with augmentation.
      crop_size: Side in pixels of the crops of photographs.
      resize_size: Shorter side in pixels of a photograph before the center crop of evaluation.
      threads: Number of decoder threads per process; 0 for one per core.
      test_fraction: Fraction of each class that is held out for testing, if there is no folder of test images.
      seed: Random seed of all held-out splits.
      search_fraction: Fraction of the training images for the search, held out from base training.
      validation_fraction: Fraction of the training images for selecting the best checkpoint.

    Returns:
      The data set.

    Raises:
      ValueError: An argument is invalid, a class is empty, or a file is not an image. Small images are decoded here; of
        photographs only the headers are read, and a damaged one raises, naming its file, when it is decoded.
      FileNotFoundError: The folder does not exist.
    """
    step = -1 if bgr else 1
    preprocessing = Preprocessing(
        IMAGENET_MEAN[::step] if mean is None else mean,
        IMAGENET_STD[::step] if std is None else std,
        *(bgr, pad, flip),
        crop_size=crop_size,
        resize_size=resize_size,
        threads=threads,
    )
    held_out = HeldOut(seed, search_fraction, validation_fraction)
    return open_folder(path, name, preprocessing, held_out, test_fraction)


def open_folder(
    path: str | Path,
    name: str | None,
    preprocessing: Preprocessing,
    held_out: HeldOut,
    test_fraction: float,
    section: str = "",
) -> Dataset:
    """As `from_folder`; `section` is the prefix of field names in messages."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give one with a sub-folder of images for each class.")
    name = name or path.resolve().name
    held_out.check(section)
    preprocessing.check(name, 1 if len(preprocessing.mean) == 1 else 3, section)
    check_limits(DataConfig(test_fraction=test_fraction), section)
    classes, train, test, notes = _divide(path, test_fraction, held_out.seed)
    train_images, test_images, shape = open_images(train, test, preprocessing)
    if isinstance(train_images, Streamed):
        sides = _shorter_sides((*train.paths, *test.paths), train_images.threads)
        notes += _enlarged(sides, preprocessing.crop_size, section)
    else:
        notes.append(f"All images have {shape[1]} x {shape[0]} pixels: they are kept in memory and not resized.")
    return Dataset(
        name=name,
        num_classes=len(classes),
        image_shape=shape,
        train=train_images,
        test=test_images,
        splits=held_out.splits(len(train)),
        preprocessing=preprocessing,
        class_names=classes,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Files(Sequence[Record]):
    """Image files as records, read on access.

    Attributes:
      paths: The files.
      labels: The class of each.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # slices are not needed
        path = self.paths[index]
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); repair or remove it.") from error
        return {"image": content, "label": self.labels[index], "source": path}


@dataclass(frozen=True)
class _Tree:
    """The contents of a folder of classes.

    Attributes:
      images: Class -> its files, both sorted.
      others: Files that are not images of a class.
    """

    images: dict[str, list[str]]
    others: list[str]


def _shorter_sides(paths: Sequence[str], threads: int) -> list[int]:
    """The shorter side of every image; checks that all files are images, by reading only their headers."""

    def read(path: str) -> int:
        with naming({"source": path}):
            return photos.check_header(path)

    with ThreadPoolExecutor(threads) as pool:
        return list(tqdm(pool.map(read, paths), desc="reading headers", unit="image", total=len(paths), delay=1))


def _enlarged(sides: list[int], crop_size: int, section: str) -> list[str]:
    """A note, which is also logged, if most images are smaller than the crops, which only costs memory and time."""
    small = sum(side < crop_size for side in sides)
    if 2 * small <= len(sides):
        return []
    note = (
        f"{small} of {len(sides)} images have a side of fewer than {section}crop_size={crop_size} pixels and are "
        f"enlarged; a smaller {section}crop_size and {section}resize_size need less memory and time."
    )
    logging.warning("%s", note)
    return [note]


def _divide(path: Path, test_fraction: float, seed: int) -> tuple[tuple[str, ...], Files, Files, list[str]]:
    """Returns the class names, the training files, the test files, and notes for the report."""
    found = [folder for folder in TEST_FOLDERS if (path / folder).is_dir()] if (path / "train").is_dir() else []
    root = path / "train" if found else path
    tree = _classes(root)
    classes = tuple(tree.images)
    _check_classes(root, tree)
    if not found:
        _check_one_level(path)
        train, test = _hold_out(tree, test_fraction, seed)
        note = f"{len(test)} of {len(train) + len(test)} images, drawn from every class, are the test images."
        return classes, train, test, [note, *_left_out(tree.others)]
    test_tree = _classes(path / found[0])
    _check_test(path / found[0], test_tree, classes)
    notes = [f"{path / folder} was not read; {path / found[0]} holds the test images." for folder in found[1:]]
    notes += _left_out(tree.others + test_tree.others)
    return classes, _files(tree.images, classes), _files(test_tree.images, classes), notes


def _classes(root: Path) -> _Tree:
    images: dict[str, list[str]] = {}
    others = []
    for entry in _visible(root):
        if not entry.is_dir():
            others.append(entry.path)
            continue
        files = list(_below(entry.path, (os.path.realpath(root),)))
        images[entry.name] = [file for file in files if Path(file).suffix.lower() in SUFFIXES]
        others += [file for file in files if Path(file).suffix.lower() not in SUFFIXES]
    return _Tree(images, others)


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """The files in a folder and the folders in it; a link back to one of those `above` is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _below(entry.path, (*above, here))
        else:
            yield entry.path


def _hold_out(tree: _Tree, fraction: float, seed: int) -> tuple[Files, Files]:
    """Divides the files into training and test files, the same fraction of every class and at least one image each."""
    rng = np.random.default_rng(seed)
    train, test = {}, {}
    for name, files in tree.images.items():
        if len(files) < 2:
            raise ValueError(f"class {name!r} has a single image, {files[0]}; add another one, for testing.")
        count = min(max(round(fraction * len(files)), 1), len(files) - 1)
        drawn = set(rng.permutation(len(files))[:count].tolist())
        test[name] = [file for i, file in enumerate(files) if i in drawn]
        train[name] = [file for i, file in enumerate(files) if i not in drawn]
    return _files(train, tuple(train)), _files(test, tuple(test))


def _files(images: dict[str, list[str]], classes: tuple[str, ...]) -> Files:
    number = {name: i for i, name in enumerate(classes)}
    paths = tuple(file for files in images.values() for file in files)
    return Files(paths, tuple(number[name] for name, files in images.items() for _ in files))


def _check_classes(path: Path, tree: _Tree) -> None:
    if len(tree.images) < 2:
        raise ValueError(
            f"{path} has {len(tree.images)} folders of classes ({', '.join(tree.images) or 'none'}); give at least "
            f"two, or train and one of {', '.join(TEST_FOLDERS)} beside each other."
        )
    for name, files in tree.images.items():
        if not files:
            raise ValueError(f"class {name!r} in {path} has no images; fill its folder or remove it.")


def _check_one_level(path: Path) -> None:
    """Raises for folders of training and test images with other names than those that are known: as two classes."""
    folders = {entry.name: list(_visible(entry.path)) for entry in _visible(path) if entry.is_dir()}
    for name, entries in folders.items():
        others = [other for other in folders if other != name]
        if name.lower().startswith("train") and others and entries and all(entry.is_dir() for entry in entries):
            raise ValueError(
                f"{path} has {name} with folders in it, and {', '.join(others)}; rename them to train and one of "
                f"{', '.join(TEST_FOLDERS)}, or, if {name} is a class, move its images into {path / name} itself."
            )


def _check_test(path: Path, tree: _Tree, classes: tuple[str, ...]) -> None:
    if unknown := [name for name in tree.images if name not in classes]:
        raise ValueError(f"{path} has a class {unknown[0]!r} that train lacks; train has {', '.join(classes)}.")
    if not any(tree.images.values()):
        raise ValueError(f"{path} has no images in folders of classes; fill it or remove it.")


def _left_out(others: list[str]) -> list[str]:
    if not others:
        return []
    return [f"{len(others)} files are not images in a class folder and were skipped, the first is {others[0]}."]
