"""Data sets in TFDS's format, opened by name; three of them can be prepared by this library, without TensorFlow."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from ddnp_jax.data.cifar10 import Cifar10
from ddnp_jax.data.dataset import Dataset, HeldOut, open_images
from ddnp_jax.data.digits import Digits
from ddnp_jax.data.imagenet2012 import Imagenet2012
from ddnp_jax.data.images import Record
from ddnp_jax.data.preprocessing import Preprocessing

BUILDERS: Mapping[str, type[tfds.core.GeneratorBasedBuilder]] = {
    "cifar10": Cifar10,
    "digits": Digits,
    "imagenet2012": Imagenet2012,
}
DAMAGE = (RuntimeError, IndexError, DecodeError)  # errors that TFDS raises for damaged and missing records
READ_BLOCK = 1000  # records per read: reading records one by one takes longer than decoding them


def open_prepared(
    name: str,
    data_dir: str | None,
    train_split: str,
    test_split: str,
    preprocessing: Preprocessing,
    held_out: HeldOut,
    label: str,
) -> Dataset:
    """Opens a data set of TFDS with one image and one label per record; raises as `data.load`.

    Args:
      name: Name of the data set in TFDS, with its configuration and version if there are several.
      data_dir: The folder of prepared data; None or "" for TFDS's default folder.
      train_split: The training split, or a slice of a split in TFDS's syntax.
      test_split: The test split, likewise; "" for the usual one.
      preprocessing: Preprocessing of the network's input.
      held_out: The held-out splits of the training images.
      label: Name of the data set in reports.

    Returns:
      The data set.
    """
    held_out.check("data.")
    builder = open_builder(name, data_dir)
    features = find_features(builder)
    height, width, channels = builder.info.features[features.image].shape
    preprocessing.check(name, _channels(channels, preprocessing), "data.")
    train_split, test_split = _splits(builder, train_split, test_split)
    num_classes = features.num_classes or _count_classes(builder, features, train_split)
    train, test = (Records(builder, part, features, num_classes) for part in (train_split, test_split))
    may_fit = height is not None and width is not None
    train_images, test_images, shape = open_images(train, test, preprocessing, may_fit=may_fit)
    return Dataset(
        name=label,
        num_classes=num_classes,
        image_shape=shape,
        train=train_images,
        test=test_images,
        splits=held_out.splits(len(train)),
        preprocessing=preprocessing,
        class_names=features.class_names,
    )


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a prepared data set; missing data are prepared if the library can do so.

    Args:
      name: A key of `BUILDERS`, or the name of a data set that TFDS knows or that is prepared in `data_dir`.
      data_dir: Folder as for `open_prepared`, or the folder that contains the data set's dataset_info.json.

    Raises:
      ValueError: The name is unknown.
      FileNotFoundError: `data_dir` does not contain the data set.
      OSError: The data set can be neither found nor prepared.
    """
    data_dir = os.path.expanduser(data_dir or "") or None
    builder = _find_builder(name, data_dir)
    can_prepare = name == "digits" or (name in BUILDERS and not data_dir)
    if not can_prepare and not _is_prepared(builder):
        otherwise = "leave it empty for a download" if name in BUILDERS else "prepare it with TFDS's own command"
        raise FileNotFoundError(
            f"data.data_dir={data_dir or ''!r} holds no prepared {name} ({builder.data_dir} has no dataset_info.json); "
            f"set it to a folder with TFDS's prepared data in the array_record format, or {otherwise}."
        )
    if not _is_prepared(builder):
        try:
            builder.download_and_prepare(file_format="array_record")
        except OSError as error:
            if not _is_prepared(builder):  # otherwise another process has prepared it at the same time
                raise OSError(
                    f"{name} could not be prepared in {builder.data_dir} ({error}); set data.data_dir to a folder "
                    f"{'that can be written' if name == 'digits' else 'that holds its prepared TFDS data'}."
                ) from error
        builder = _find_builder(name, data_dir)
    if not _is_prepared(builder) or builder.info.file_format.value != "array_record":
        raise FileNotFoundError(
            f"{builder.data_dir} exists but is not a complete data set in TFDS's array_record format; move it away, or "
            "set data.data_dir to another folder."
        )
    return builder


def _find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    with _readable(data_dir or "TFDS's own folder", ParseError):
        return _builder(name, data_dir)


def _builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    if name in BUILDERS:
        return BUILDERS[name](data_dir=data_dir)
    if data_dir and os.path.exists(os.path.join(data_dir, "dataset_info.json")):
        with _readable(data_dir, ValueError):
            builder = tfds.builder_from_directory(data_dir)
        if builder.name != name:
            raise ValueError(f"data.data_dir={data_dir!r} holds {builder.name}, not data.name={name!r}; name it.")
        return builder
    if not name:
        raise _unknown(name)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except AssertionError as error:  # for a version that does not exist
        raise ValueError(f"data.name={name!r} cannot be opened by TFDS ({_flat(error)}).") from error
    except tfds.core.registered.DatasetNotFoundError as error:
        raise _unknown(name) from error
    except (ValueError, RuntimeError) as error:  # for a configuration or version that does not exist
        raise ValueError(f"data.name={name!r} cannot be opened by TFDS ({_flat(error)}).") from error


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"data.name={name!r} is unknown; use {', '.join(sorted(BUILDERS))}, 'folder', or the name of a data set "
        "that TFDS knows or that is prepared in data.data_dir."
    )


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextlib.contextmanager
def _readable(folder: str | os.PathLike, *errors: type[Exception]) -> Iterator[None]:
    """Adds the folder of the data set to an error of TFDS or of its readers.

    Raises:
      ValueError: A file of the data set is damaged or missing.
    """
    try:
        yield
    except errors as error:
        raise ValueError(
            f"a file of the data set in {folder} is damaged or missing ({_flat(error)}); copy or prepare it again."
        ) from error


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether the data set is complete: TFDS writes into a temporary folder and renames it at the end."""
    return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json"))


class Features(NamedTuple):
    """The features of a data set that are the image and the label.

    Attributes:
      image: Name of the feature with the image.
      label: Name of the feature with the label.
      num_classes: Number of classes; None if it must be determined from the labels.
      class_names: Names of the classes; None if there are none.
    """

    image: str
    label: str
    num_classes: int | None
    class_names: tuple[str, ...] | None


def find_features(builder: tfds.core.DatasetBuilder) -> Features:
    """Finds the image and the label of a data set; the label is a ClassLabel or, if there is none, an integer.

    If there are several candidates, the one among the data set's supervised keys is used.

    Raises:
      ValueError: There is no image or label, or several candidates.
    """
    features = dict(sorted(builder.info.features.items()))  # their order in files varies
    keys = tuple(builder.info.supervised_keys or ())
    image = _single(builder, "image", [name for name in features if _is_image(features[name])], keys)
    named = [name for name in features if isinstance(features[name], tfds.features.ClassLabel)]
    numbers = [name for name in features if _is_whole_number(features[name])]
    label = _single(builder, "label", named or numbers, keys)
    count = getattr(features[label], "num_classes", None)
    names = getattr(features[label], "names", None) if count else None
    return Features(image, label, count, tuple(names) if names else None)


def _single(builder: tfds.core.DatasetBuilder, what: str, found: list[str], keys: tuple[Any, ...]) -> str:
    if len(found) > 1:
        found = [name for name in found if name in keys] or found
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(builder.info.features.items()))
    raise ValueError(
        f"data.name={builder.name!r} has {len(found)} features that can be the {what} "
        f"({', '.join(found) or 'none'}); it must have exactly one. Its features are {known}."
    )


def _is_image(feature: Any) -> bool:
    """Whether a feature is an image of 8 or 16 bits, and not a map of labels."""
    is_map = isinstance(feature, tfds.features.LabeledImage)
    return isinstance(feature, tfds.features.Image) and not is_map and feature.np_dtype in (np.uint8, np.uint16)


def _is_whole_number(feature: Any) -> bool:
    is_tensor = isinstance(feature, tfds.features.Tensor)
    return is_tensor and feature.shape == () and np.issubdtype(feature.np_dtype, np.integer)


def _channels(stored: int | None, preprocessing: Preprocessing) -> int:
    """Number of channels after decoding; if the data set does not declare it, one for a single mean, otherwise 3."""
    if stored is None:
        return 1 if len(preprocessing.mean) == 1 else 3
    return 1 if stored == 1 else 3


def _splits(builder: tfds.core.DatasetBuilder, train_split: str, test_split: str) -> tuple[str, str]:
    """Returns the training and the test split, after checking that they exist and have no image in common."""
    usual = (getattr(builder, "TEST_SPLIT", "test"), "validation")
    test_split = test_split or next((name for name in usual if name in builder.info.splits), usual[0])
    train, test = (_part(builder, *field) for field in (("train_split", train_split), ("test_split", test_split)))
    if train.name == test.name and max(train.first, test.first) < min(train.end, test.end):
        raise ValueError(
            f"data.train_split={train_split!r} and data.test_split={test_split!r} have images in common; give parts "
            "that have none."
        )
    return train_split, test_split


class _Part(NamedTuple):
    """Records first..end - 1 of a split."""

    name: str
    first: int
    end: int


def _part(builder: tfds.core.DatasetBuilder, field: str, split: str) -> _Part:
    """The records that a split, or a slice of a split, refers to."""
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    named = re.fullmatch(r"([^\[\]+]+)(\[[^\[\]]*\])?", split)
    if named and named[1] in counts:
        with contextlib.suppress(ValueError):  # replaced by the error below, which names the field
            (part,) = tfds.core.splits.AbstractSplit.from_spec(split).to_absolute(builder.info.splits)
            first, end = part.from_ or 0, counts[named[1]] if part.to is None else part.to
            if first < end:  # TFDS accepts slices that end before they begin
                return _Part(named[1], first, end)
    known = ", ".join(f"{name}: {count} images" for name, count in counts.items())
    raise ValueError(
        f"data.{field}={split!r} is not a part of {builder.name} ({known}); use the name of a split, or a slice of one "
        "in TFDS's form, 'train[:2000]' or 'train[10%:20%]'."
    )


def _count_classes(builder: tfds.core.DatasetBuilder, features: Features, split: str) -> int:
    """Determines the number of classes by reading all labels."""
    records = _blocks(_source(builder, split, features), builder.data_dir)
    return 1 + max(int(record[features.label]) for record in records)


def open_records(builder: tfds.core.DatasetBuilder, split: str) -> "Records":
    """Opens the records of a split, or of a slice of a split."""
    features = find_features(builder)
    return Records(builder, split, features, features.num_classes or _count_classes(builder, features, split))


class Records(Sequence[Record]):
    """Encoded images and their labels, as TFDS stores them, with random access."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, features: Features, num_classes: int) -> None:
        self._source, self._split = _source(builder, split, features), split
        self._features, self._num_classes, self._folder = features, num_classes, builder.data_dir

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # slices are not needed
        with _readable(self._folder, *DAMAGE):
            stored = self._source[index]
        return self._record(index, stored)

    def __iter__(self) -> Iterator[Record]:
        return itertools.starmap(self._record, enumerate(_blocks(self._source, self._folder)))

    def _record(self, index: int, stored: Mapping[str, Any]) -> Record:
        label, source = int(stored[self._features.label]), f"record {index} of {self._split!r}"
        if not 0 <= label < self._num_classes:
            raise ValueError(
                f"{source} has the label {label}; with {self._num_classes} classes it must be from 0 to "
                f"{self._num_classes - 1}."
            )
        return {"image": stored[self._features.image], "label": label, "source": source}


def _source(builder: tfds.core.DatasetBuilder, split: str, features: Features) -> Any:
    # The image stays encoded, because TFDS's decoder depends on which other packages are installed.
    return builder.as_data_source(split, decoders={features.image: tfds.decode.SkipDecoding()})


def _blocks(source: Any, folder: str | os.PathLike) -> Iterator[Mapping[str, Any]]:
    """Yields all records in order."""
    for start in range(0, len(source), READ_BLOCK):
        with _readable(folder, *DAMAGE):
            block = source.__getitems__(range(start, min(start + READ_BLOCK, len(source))))
        yield from block
