"""Data sets prepared by TFDS: features and splits are found independently of their names."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddnp_jax import data
from ddnp_jax.data import prepared
from tests.test_data import make_config
from tests.test_photos import smooth

COLORS = dict(mean=(0.0,) * 3, std=(1.0,) * 3, crop_size=8, resize_size=8, search_fraction=0.0)
MASK = tfds.features.LabeledImage(labels=3, shape=(4, 4, 1))
IMAGE, LABEL = tfds.features.Image, tfds.features.ClassLabel


def picture(i, size=(12, 12)):
    return Image.fromarray(smooth(*size, seed=i))


def write(folder, features, splits, name="things", supervised=None):
    """Prepares a data set as its users do: `splits` are lists of records by name."""

    class Things(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised,
                disable_shuffling=True,
            )

        def _split_generators(self, _):
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Things.name = name
    Things(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def things(folder, count=12, size=(12, 12), **options):
    """Pictures of 3 classes under unusual names, in the splits fit and held."""
    features = {"picture": IMAGE(shape=(12, 12, 3)), "kind": LABEL(names=["x", "y", "z"]), "note": tfds.features.Text()}
    records = [{"picture": picture(i, size), "kind": "xyz"[i % 3], "note": str(i)} for i in range(count + 4)]
    return write(folder, features, {"fit": records[:count], "held": records[count:]}, **options)


def loaded(folder, **fields):
    fields = dict(name="things", data_dir=str(folder), train_split="fit", test_split="held") | COLORS | fields
    return data.load(make_config(**fields))


def refused(folder, error=ValueError, **fields):
    with pytest.raises(error) as caught:
        loaded(folder, **fields)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return things(tmp_path_factory.mktemp("tfds"))


def test_features_and_splits_of_any_name(folder):
    dataset = loaded(folder)
    np.testing.assert_array_equal(dataset.train.images, [smooth(12, 12, seed=i) for i in range(12)])
    np.testing.assert_array_equal(dataset.test.images, [smooth(12, 12, seed=i) for i in range(12, 16)])
    assert dataset.train.labels.tolist() == [i % 3 for i in range(12)]
    assert dataset.class_names == ("x", "y", "z") and dataset.image_shape == (12, 12, 3)
    assert dataset.name == "things, fit"
    assert "tensorflow" not in sys.modules


def test_slices_of_one_split(folder):
    dataset = loaded(folder, train_split="fit[:8]", test_split="fit[8:]", label="Things")
    np.testing.assert_array_equal(dataset.test.images, [smooth(12, 12, seed=i) for i in range(8, 12)])
    assert len(dataset.train) == 8
    assert dataset.name == "Things, fit[:8], tested on fit[8:]"


def test_the_folder_of_the_data_set_itself(folder):
    assert len(loaded(folder / "things" / "1.2.3").train) == 12
    sentence = f"data.data_dir='{folder}/things/1.2.3' holds things, not data.name='cats'; name it."
    assert refused(folder / "things" / "1.2.3", name="cats") == sentence


@pytest.mark.parametrize(("splits", "used"), [(("train", "validation"), 1), (("train", "test", "validation"), 1)])
def test_the_usual_test_split(tmp_path, splits, used):
    records = [[{"image": picture(10 * part + i), "label": i % 2} for i in range(2)] for part in range(len(splits))]
    features = {"image": IMAGE(shape=(12, 12, 3)), "label": LABEL(num_classes=2)}
    dataset = loaded(
        write(tmp_path, features, dict(zip(splits, records, strict=True))), train_split="train", test_split=""
    )
    np.testing.assert_array_equal(dataset.test.images[0], smooth(12, 12, seed=10 * used))
    assert dataset.name == "things"


def test_images_of_several_sizes_are_streamed(tmp_path):
    features = {"photo": IMAGE(shape=(None, None, 3)), "label": LABEL(num_classes=3)}
    records = [{"photo": picture(i, (20 + i, 30)), "label": i % 3} for i in range(6)]
    dataset = loaded(write(tmp_path, features, {"fit": records[:4], "held": records[4:]}))
    assert isinstance(dataset.train, data.Streamed) and dataset.image_shape == (8, 8, 3)
    indices = data.BatchIndices(np.int32([2]), np.int32([0]))
    pixels, labels = dataset.train.read(indices, None)
    resized = picture(2, (22, 30)).resize((10, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels[0], np.asarray(resized)[:, 1:9])
    assert labels.tolist() == [2]


def test_large_images_of_one_size_are_streamed(tmp_path):
    features = {"photo": IMAGE(shape=(100, 20, 3)), "label": LABEL(num_classes=3)}
    records = [{"photo": picture(i, (100, 20)), "label": i % 3} for i in range(6)]
    dataset = loaded(write(tmp_path, features, {"fit": records[:4], "held": records[4:]}))
    assert isinstance(dataset.train, data.Streamed) and len(dataset.test) == 2


def test_images_that_may_be_of_any_size_are_streamed_even_where_all_have_one(tmp_path):
    features = {"photo": IMAGE(shape=(None, None, 3)), "label": LABEL(num_classes=1)}
    records = [{"photo": picture(i), "label": 0} for i in range(4)]
    dataset = loaded(write(tmp_path, features, {"fit": records[:2], "held": records[2:]}))
    assert isinstance(dataset.train, data.Streamed)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_images(tmp_path, channels):
    features = {"image": IMAGE(shape=(12, 12, channels)), "label": LABEL(num_classes=3)}
    mode = {1: "L", 4: "RGBA"}[channels]
    records = [{"image": picture(i).convert(mode), "label": i % 3} for i in range(6)]
    if channels == 4:
        records[0]["image"].putalpha(0)
    folder = write(tmp_path, features, {"fit": records[:4], "held": records[4:]})
    dataset = loaded(folder, mean=(0.0,) * min(channels, 3), std=(1.0,) * min(channels, 3))
    if channels == 1:
        np.testing.assert_array_equal(dataset.train.images[3, ..., 0], np.asarray(records[3]["image"]))
    else:
        assert (dataset.train.images[0] == 255).all()
        np.testing.assert_array_equal(dataset.train.images[3], smooth(12, 12, seed=3))
    assert "data.mean has 2 entries; the images of things have" in refused(folder, mean=(0.5,) * 2)


def test_sixteen_bits(tmp_path):
    levels = np.arange(144, dtype=np.uint16).reshape(12, 12) * 455
    features = {
        "image": IMAGE(shape=(12, 12, 1), dtype=np.uint16, encoding_format="png"),
        "label": LABEL(num_classes=1),
    }
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    records = [{"image": file.getvalue(), "label": 0}] * 2
    dataset = loaded(write(tmp_path, features, {"fit": records, "held": records}), mean=(0.0,), std=(1.0,))
    np.testing.assert_array_equal(dataset.train.images[1, ..., 0], np.round(levels / 257))


def test_whole_numbers_as_labels_are_counted(tmp_path):
    features = {"image": IMAGE(shape=(12, 12, 3)), "digit": tfds.features.Scalar(np.int64)}
    records = [{"image": picture(i), "digit": i % 5} for i in range(10)]
    dataset = loaded(write(tmp_path, features, {"fit": records, "held": records[:4]}))
    assert dataset.num_classes == 5 and dataset.class_names is None
    assert dataset.train.labels.tolist() == [i % 5 for i in range(10)]


def test_the_supervised_keys_choose_among_several_labels(tmp_path):
    features = {"image": IMAGE(shape=(12, 12, 3)), "fine": LABEL(num_classes=4), "coarse": LABEL(num_classes=2)}
    records = [{"image": picture(i), "fine": i % 4, "coarse": i % 2} for i in range(8)]
    splits = {"fit": records, "held": records[:4]}
    assert loaded(write(tmp_path / "a", features, splits, supervised=("image", "fine"))).num_classes == 4
    assert refused(write(tmp_path / "b", features, splits)) == (
        "data.name='things' has 2 features that can be the label (coarse, fine); it must have exactly one. Its "
        "features are coarse (ClassLabel), fine (ClassLabel), image (Image)."
    )


def test_a_data_set_without_images_is_refused(tmp_path):
    features = {"sound": tfds.features.Text(), "label": LABEL(num_classes=2), "mask": MASK}
    records = [{"sound": "a", "label": 0, "mask": Image.new("L", (4, 4))}]
    assert refused(write(tmp_path, features, {"fit": records, "held": records})) == (
        "data.name='things' has 0 features that can be the image (none); it must have exactly one. Its "
        "features are label (ClassLabel), mask (LabeledImage), sound (Text)."
    )


@pytest.mark.parametrize("streams", [False, True])
def test_labels_that_are_no_classes_are_named(tmp_path, streams):
    shape = (None, None, 3) if streams else (12, 12, 3)
    features = {"image": IMAGE(shape=shape), "label": tfds.features.Scalar(np.int64)}
    records = [{"image": picture(i), "label": label} for i, label in enumerate((0, 1, -1, 2))]
    folder = write(tmp_path, features, {"fit": records[:2], "held": records})

    def read(dataset):
        index = np.arange(4, dtype=np.int32)
        return dataset.test.read(data.BatchIndices(index, 0 * index), None)

    with pytest.raises(
        ValueError, match=r"^record 2 of 'held' has the label -1; with 2 classes it must be from 0 to 1\.$"
    ):
        read(loaded(folder))


def test_damaged_records_are_named(tmp_path):
    features = {"image": IMAGE(shape=(12, 12, 3)), "label": LABEL(num_classes=2)}
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    records = [{"image": picture(0), "label": 0}, {"image": file.getvalue()[:-60], "label": 1}]
    folder = write(tmp_path, features, {"fit": records, "held": records[:1]})
    assert re.fullmatch(r"record 1 of 'fit' cannot be decoded \([^<]+\); repair or remove it\.", refused(folder))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(train_split="train"),
            "data.train_split='train' is not a part of things (fit: 12 images, held: 4 images); use the name of a split"
            ", or a slice of one in TFDS's form, 'train[:2000]' or 'train[10%:20%]'.",
        ),
        (dict(test_split=""), "data.test_split='test' is not a part of things (fit: 12 images, held: 4 images); use"),
        (dict(test_split="held[9:]"), "data.test_split='held[9:]' is not a part of things"),
        (
            dict(train_split="fit[:9]", test_split="fit[8:]"),
            "data.train_split='fit[:9]' and data.test_split='fit[8:]' have images in common; give parts that have "
            "none.",
        ),
        (dict(search_fraction=2.0), "data.search_fraction=2.0 must be in [0, 1)"),
        (dict(mean=(0.5,), std=(0.5,)), "data.mean has 1 entries; the images of things have 3 channels."),
    ],
)
def test_impossible_fields_are_named(folder, fields, sentence):
    assert refused(folder, **fields).startswith(sentence)


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


def overwrite(file):
    file.write_text("{")


@pytest.mark.parametrize(
    ("pattern", "damage", "reason"),
    [
        ("*fit*", Path.unlink, r"open\(\) failed: No such file or directory; opening .*things-fit\.array_record[^ )]*"),
        ("*fit*", cut, "ArrayRecord file should be at least 64KB big"),
        ("dataset_info.json", overwrite, "Failed to load JSON: .*"),
    ],
)
def test_damaged_and_missing_files_of_a_data_set_are_named(tmp_path, pattern, damage, reason):
    (file,) = (things(tmp_path) / "things" / "1.2.3").glob(pattern)
    damage(file)
    sentence = (
        rf"a file of the data set in {tmp_path}[^ ]* is damaged or missing \({reason}\); copy or prepare it again\."
    )
    assert re.fullmatch(sentence, refused(tmp_path))
    assert re.fullmatch(sentence, refused(file.parent))


def test_data_sets_that_are_not_prepared_are_named(tmp_path):
    for name, version in (("mnist", "mnist/3.0.1"), ("cifar10_corrupted/fog_2", "cifar10_corrupted/fog_2/1.0.0")):
        assert refused(tmp_path, FileNotFoundError, name=name) == (
            f"data.data_dir='{tmp_path}' holds no prepared {name} ({tmp_path}/{version} has no dataset_info.json); "
            "set it to a folder with TFDS's prepared data in the array_record format, or prepare it with "
            "TFDS's own command."
        )
    for name in ("mnist/blue", "mnist:9.9.9"):
        assert refused(tmp_path, name=name).startswith(f"data.name='{name}' cannot be opened by TFDS (")
    assert refused(tmp_path, name="").startswith("data.name='' is unknown; use cifar10, digits, imagenet2012, 'folder'")


def test_every_prepared_data_set_of_this_library_has_one_image_and_one_label(shared):
    for name, count in (("cifar10", 10), ("imagenet2012", 1000)):
        found = prepared.find_features(prepared.open_builder(name, str(shared / "tfds")))
        assert (found.image, found.label, found.num_classes) == ("image", "label", count)
