"""Folders of image files: the role of every file, other files beside them, and errors that name the path."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from ddnp_jax import data
from ddnp_jax.config import DataConfig
from tests.test_photos import encode, smooth


def fill(folder, *names, size=(12, 12), first_seed=0):
    """Writes an image for each name, with the pixels of `smooth`, and returns the folder."""
    for seed, name in enumerate(names, first_seed):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(*size, seed=seed)).save(file)
    return folder


def every_image(images):
    """Pixels and labels of a data set in memory or in a stream, without augmentation and normalization."""
    if isinstance(images, data.InMemory):
        return images.images, images.labels
    index = np.arange(len(images), dtype=np.int32)
    return images.read(data.BatchIndices(index, np.zeros_like(index)), None)


def classes_of(folder, count=10, names=("cat", "dog", "eel"), size=(12, 12)):
    for i, name in enumerate(names):
        fill(folder, *(f"{name}/{j}.png" for j in range(count)), size=size, first_seed=100 * i)
    return folder


def test_train_and_test_lie_beside_each_other(tmp_path):
    fill(tmp_path, "train/dog/b.png", "train/dog/a.png", "train/Cat/x.png", "train/eel/y.png")
    fill(tmp_path, "test/eel/z.png", "test/Cat/w.png", first_seed=10)
    dataset = data.from_folder(tmp_path, search_fraction=0.25)
    assert dataset.class_names == ("Cat", "dog", "eel") and dataset.num_classes == 3
    images, labels = every_image(dataset.train)
    assert labels.tolist() == [0, 1, 1, 2]
    np.testing.assert_array_equal(images, [smooth(12, 12, seed=seed) for seed in (2, 1, 0, 3)])
    images, labels = every_image(dataset.test)
    assert labels.tolist() == [0, 2]
    np.testing.assert_array_equal(images, [smooth(12, 12, seed=seed) for seed in (11, 10)])
    assert dataset.name == tmp_path.name and dataset.image_shape == (12, 12, 3)
    assert {name: len(part) for name, part in dataset.splits.items()} == {"train": 3, "search": 1, "validation": 0}
    assert dataset.notes == ("All images have 12 x 12 pixels: they are kept in memory and not resized.",)


@pytest.mark.parametrize(
    ("present", "used"),
    [(("val",), "val"), (("validation", "val"), "val"), (("validation",),) * 2, (("valid",), "valid")],
)
def test_other_names_of_the_test_folder(tmp_path, present, used):
    used = used if isinstance(used, str) else used[0]
    classes_of(tmp_path / "train")
    for i, folder in enumerate(present):
        fill(tmp_path / folder, "dog/1.png", first_seed=1000 + i)
    dataset = data.from_folder(tmp_path)
    seed = 1000 + present.index(used)
    np.testing.assert_array_equal(every_image(dataset.test)[0], [smooth(12, 12, seed=seed)])
    unread = [f"{tmp_path}/{folder} was not read; {tmp_path}/{used} holds the test images." for folder in present]
    assert list(dataset.notes[:-1]) == [note for note in unread if not note.startswith(f"{tmp_path}/{used} was")]


def held_out(dataset):
    return {images.tobytes() for images in every_image(dataset.test)[0]}


def test_a_folder_of_classes_holds_out_the_same_part_of_each(tmp_path):
    classes_of(tmp_path, 10, ("cat", "dog"))
    fill(tmp_path, *(f"eel/{i}.png" for i in range(20)), first_seed=500)
    dataset = data.from_folder(tmp_path, test_fraction=0.3)
    (images, labels), (tested, test_labels) = every_image(dataset.train), every_image(dataset.test)
    assert np.bincount(labels).tolist() == [7, 7, 14]
    assert np.bincount(test_labels).tolist() == [3, 3, 6]
    expected = {smooth(12, 12, seed=seed).tobytes() for seed in (*range(10), *range(100, 110), *range(500, 520))}
    found = [image.tobytes() for image in (*images, *tested)]
    assert len(found) == 40 and set(found) == expected
    assert dataset.notes[0] == "12 of 40 images, drawn from every class, are the test images."
    again, other = data.from_folder(tmp_path, test_fraction=0.3), data.from_folder(tmp_path, test_fraction=0.3, seed=1)
    assert held_out(again) == held_out(dataset) != held_out(other)


def test_every_class_is_tested_and_trained_on(tmp_path):
    classes_of(tmp_path, 2)
    for fraction in (0.01, 0.99):
        dataset = data.from_folder(tmp_path, test_fraction=fraction)
        assert every_image(dataset.train)[1].tolist() == every_image(dataset.test)[1].tolist() == [0, 1, 2]


def test_the_file_systems_order_does_not_matter(tmp_path, monkeypatch):
    classes_of(tmp_path)
    fill(tmp_path, "cat/deep/er/1.png", first_seed=900)
    expected = data.from_folder(tmp_path)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    found = data.from_folder(tmp_path)
    for ours, theirs in ((found.train, expected.train), (found.test, expected.test)):
        for a, b in zip(every_image(ours), every_image(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_else_lies_there(tmp_path):
    classes_of(tmp_path / "train", 3, ("cat", "dog"))
    classes_of(tmp_path / "val", 1, ("cat", "dog"))
    fill(tmp_path / "train", "cat/deep/er/9.JPEG", ".hidden/1.png", "cat/.thumbnails/1.png", first_seed=50)
    (tmp_path / "train/cat/.DS_Store").write_bytes(b"")
    (tmp_path / "train/readme.txt").write_text("no image")
    (tmp_path / "train/dog/labels.csv").write_text("no image")
    (tmp_path / "train/dog/gone.png").symlink_to(tmp_path / "nowhere.png.txt")
    (tmp_path / "train/cat/itself").symlink_to(tmp_path / "train/cat", target_is_directory=True)
    (tmp_path / "train/cat/all").symlink_to(tmp_path / "train", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", "1.png", first_seed=70)
    (tmp_path / "train/dog/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "train/dog/gone.png").unlink()
    dataset = data.from_folder(tmp_path)
    images, labels = every_image(dataset.train)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(images[7], smooth(12, 12, seed=70))
    first = tmp_path / "train/dog/labels.csv"
    assert dataset.notes[0] == (f"2 files are not images in a class folder and were skipped, the first is {first}.")


def test_photographs_are_streamed_and_small_images_of_one_size_are_not(tmp_path):
    photographs = fill(classes_of(tmp_path / "a", 4), "cat/other.png", size=(12, 13))
    dataset = data.from_folder(photographs, crop_size=8, resize_size=12)
    assert isinstance(dataset.train, data.Streamed) and dataset.image_shape == (8, 8, 3)
    assert every_image(dataset.train)[0].shape == (len(dataset.train), 8, 8, 3)
    large = data.from_folder(classes_of(tmp_path / "b", 4, size=(97, 12)))
    assert isinstance(large.train, data.Streamed) and large.image_shape == (224, 224, 3)
    assert large.serving()["resize_size"] == 256 and large.serving()["crop_size"] == 224
    small = data.from_folder(classes_of(tmp_path / "c", 4, size=(96, 12)))
    assert isinstance(small.train, data.InMemory) and small.image_shape == (96, 12, 3)
    assert small.serving()["resize_size"] is None and small.serving()["crop_size"] is None
    fill(classes_of(tmp_path / "d" / "train", 4), size=(12, 12))
    differing = data.from_folder(classes_of(tmp_path / "d" / "test", 4, size=(13, 12)).parent)
    assert isinstance(differing.train, data.Streamed)


def test_photographs_that_are_enlarged_are_noted(tmp_path):
    fill(classes_of(tmp_path, 2, size=(20, 30)), "cat/large.png", "dog/large.png", size=(30, 40))
    assert not any("enlarged" in note for note in data.from_folder(tmp_path, crop_size=20, resize_size=24).notes)
    assert data.from_folder(tmp_path, crop_size=21, resize_size=24).notes[-1] == (
        "6 of 8 images have a side of fewer than crop_size=21 pixels and are enlarged; a smaller crop_size and "
        "resize_size need less memory and time."
    )
    fill(tmp_path, *(f"eel/large{i}.png" for i in range(4)), size=(30, 40))  # now they are half
    assert not any("enlarged" in note for note in data.from_folder(tmp_path, crop_size=21, resize_size=24).notes)


def test_one_mean_makes_grey_images(tmp_path):
    dataset = data.from_folder(classes_of(tmp_path), mean=(0.5,), std=(0.25,))
    assert dataset.image_shape == (12, 12, 1) and dataset.serving()["channel_order"] == "grey"
    streamed = data.from_folder(
        classes_of(tmp_path, size=(100, 120)), mean=(0.5,), std=(0.25,), crop_size=8, resize_size=8
    )
    pixels = every_image(streamed.test)
    assert pixels[0].shape == (6, 8, 8, 1)
    images, _ = streamed.test.batch((), pixels, None)
    np.testing.assert_allclose(images, (pixels[0] / 255 - 0.5) / 0.25, atol=1e-5)


def test_networks_that_see_blue_first_are_served_so(tmp_path):
    dataset = data.from_folder(classes_of(tmp_path), mean=np.zeros(3, np.float32), std=np.ones(3), bgr=True)
    assert json.loads(json.dumps(dataset.serving()))["channel_order"] == "bgr"
    np.testing.assert_allclose(dataset.test.first(1)[0], dataset.test.images[0][..., ::-1] / 255, atol=1e-6)
    pixels, labels = dataset.test.served(np.array([3, 1]))
    np.testing.assert_array_equal(pixels, dataset.test.images[[3, 1]][..., ::-1])
    np.testing.assert_array_equal(labels, dataset.test.labels[[3, 1]])


def test_the_usual_mean_is_in_the_networks_channel_order(tmp_path):
    classes_of(tmp_path)
    for bgr, mean in ((False, (0.485, 0.456, 0.406)), (True, (0.406, 0.456, 0.485))):
        dataset = data.from_folder(tmp_path, bgr=bgr)
        assert dataset.preprocessing.mean == mean
        configured = data.load(DataConfig(name="folder", data_dir=str(tmp_path), bgr=bgr))
        assert dataset.preprocessing == configured.preprocessing


def test_photographs_are_served_as_the_crops_that_the_network_sees(tmp_path):
    sizes = dict(crop_size=8, resize_size=9)
    dataset = data.from_folder(classes_of(tmp_path, size=(100, 120)), mean=(0.5,) * 3, std=(0.25,) * 3, **sizes)
    pixels, labels = dataset.test.served(np.arange(2))
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 8, 8, 3) and len(labels) == 2
    np.testing.assert_allclose(dataset.test.first(2), (pixels / 255 - 0.5) / 0.25, atol=1e-5)


# --- the command line's fields -------------------------------------------------------------------------------------


def section(folder, **fields):
    fields = dict(name="folder", data_dir=str(folder)) | fields
    held_out = dict(seed=1, search_fraction=0.2, validation_fraction=0.1, test_fraction=0.25)
    pixels = dict(mean=(0.5,) * 3, std=(0.25,) * 3, pad=1, flip=False, crop_size=8, resize_size=9, threads=2)
    return DataConfig(**held_out | pixels | fields)


def test_the_configuration_opens_the_same_folder(tmp_path):
    classes_of(tmp_path, size=(100, 120))
    dataset = data.load(section(tmp_path))
    same = data.from_folder(
        tmp_path,
        **dict(mean=(0.5,) * 3, std=(0.25,) * 3, pad=1, flip=False, crop_size=8, resize_size=9, threads=2),
        **dict(seed=1, search_fraction=0.2, validation_fraction=0.1, test_fraction=0.25),
    )
    assert dataset.preprocessing == same.preprocessing and dataset.serving() == same.serving()
    assert dataset.name == same.name == tmp_path.name and dataset.train.threads == 2
    for name, part in dataset.splits.items():
        np.testing.assert_array_equal(part, same.splits[name])
    for ours, theirs in ((dataset.train, same.train), (dataset.test, same.test)):
        for a, b in zip(every_image(ours), every_image(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    assert data.load(section(tmp_path, label="Animals")).name == "Animals"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(data_dir=""), "data.data_dir must be the folder of images where data.name='folder'."),
        (
            dict(train_split="train[:9]"),
            "data.train_split='train[:9]' is for TFDS's data sets; leave it 'train' for a folder of images, as "
            "configs/own.py does.",
        ),
        (
            dict(test_split="test"),
            "data.test_split='test' is for TFDS's data sets; leave it '' for a folder of images, as "
            "configs/own.py does.",
        ),
        (dict(test_fraction=1.0), "data.test_fraction=1.0 must be in (0, 1)."),
        (dict(mean=(0.5,) * 2), "data.mean has 2 entries; the images of {name} have 3 channels."),
        (dict(mean=(0.5,), std=(1.0,), bgr=True), "data.bgr is for images of 3 channels; those of {name} have 1."),
        (dict(crop_size=10), "data.crop_size=10 must be from 1 to data.resize_size=9 pixels."),
        (dict(seed=-2), "data.seed=-2 must be at least 0."),
    ],
)
def test_impossible_fields_are_named(tmp_path, fields, sentence):
    sentence = sentence.format(name=tmp_path.name)
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        data.load(section(classes_of(tmp_path), **fields))


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(folder, error=ValueError, **options):
    with pytest.raises(error) as caught:
        data.from_folder(folder, **options)
    return str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (classes_of(tmp_path) / "cat" / "z.png").symlink_to("/nowhere.png")
    sentence = f"{tmp_path}/cat/z.png cannot be read (No such file or directory); repair or remove it."
    assert refused(tmp_path) == sentence


def test_folders_that_are_none_are_named(tmp_path):
    sentence = f"{tmp_path}/nowhere is not a folder; give one with a sub-folder of images for each class."
    assert refused(tmp_path / "nowhere", FileNotFoundError) == sentence
    fill(tmp_path, "file.png")
    assert refused(tmp_path / "file.png", FileNotFoundError).startswith(f"{tmp_path}/file.png is not a folder")


def test_a_folder_without_classes_is_named(tmp_path):
    fill(tmp_path, "1.png", "2.png")
    assert refused(tmp_path) == (
        f"{tmp_path} has 0 folders of classes (none); give at least two, or train and one of test, val, valid, "
        "validation beside each other."
    )
    classes_of(tmp_path / "train")
    assert refused(tmp_path).startswith(f"{tmp_path} has 1 folders of classes (train); give at least two, or train and")


@pytest.mark.parametrize(("train", "test"), [("train", "dev"), ("Train", "Test"), ("training", "testing")])
def test_other_names_of_both_folders_are_not_two_classes(tmp_path, train, test):
    classes_of(tmp_path / train)
    classes_of(tmp_path / test)
    sentence = f"{tmp_path} has {train} with folders in it, and {test}; rename them to train and one of test, val, "
    with pytest.raises(ValueError, match=re.escape(sentence)):
        data.from_folder(tmp_path)


def test_trains_are_a_class(tmp_path):
    classes_of(tmp_path, names=("plane", "train"))
    assert data.from_folder(tmp_path).class_names == ("plane", "train")


def test_classes_without_images_are_named(tmp_path):
    classes_of(tmp_path)
    (tmp_path / "fox").mkdir()
    assert refused(tmp_path) == f"class 'fox' in {tmp_path} has no images; fill its folder or remove it."
    fill(tmp_path, "fox/1.png")
    assert refused(tmp_path) == f"class 'fox' has a single image, {tmp_path}/fox/1.png; add another one, for testing."


def test_classes_of_the_test_alone_are_named(tmp_path):
    classes_of(tmp_path / "train")
    (tmp_path / "test").mkdir()
    assert refused(tmp_path) == f"{tmp_path}/test has no images in folders of classes; fill it or remove it."
    classes_of(tmp_path / "test", names=("cat", "fox"))
    assert refused(tmp_path) == f"{tmp_path}/test has a class 'fox' that train lacks; train has cat, dog, eel."
    (tmp_path / "test/fox").rename(tmp_path / "test/.fox")
    assert every_image(data.from_folder(tmp_path).test)[1].tolist() == [0] * 10


@pytest.mark.parametrize("size", [(12, 12), (120, 150)], ids=["in memory", "streamed"])
@pytest.mark.parametrize("damage", ["truncated", "no image"])
def test_damaged_files_are_named(tmp_path, size, damage):
    classes_of(tmp_path / "train", size=size)
    classes_of(tmp_path / "test", size=size)
    whole = encode(smooth(*size))
    (tmp_path / "train/dog/7.jpg").write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>")
    sentence = rf"^{tmp_path}/train/dog/7\.jpg cannot be decoded \([^<>]+\); repair or remove it\.$"
    with pytest.raises(ValueError, match=sentence):
        every_image(data.from_folder(tmp_path).train)


def test_photographs_that_are_none_are_named_before_any_is_needed(tmp_path):
    folder = classes_of(tmp_path, size=(120, 100))
    (folder / "eel" / "7.png").write_text("<html>not found</html>")
    with pytest.raises(
        ValueError, match=r"eel/7\.png cannot be decoded \(it is not an image in a known format\); repair or"
    ):
        data.from_folder(folder)
    (folder / "eel" / "7.png").unlink()
    (folder / "eel" / "7.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"eel/7\.png cannot be decoded \(No such file or directory\)"):
        data.from_folder(folder)
