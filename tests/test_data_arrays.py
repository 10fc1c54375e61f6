"""Data sets from arrays: unchanged and normalized images, and errors that name the index of an invalid one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import ddnp_jax
from ddnp_jax import data
from tests.test_data import find_crops

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (40, 6, 5, 3), np.uint8)
LABELS = np.arange(40) % 4
NO_HOLD_OUT = dict(search_fraction=0.0, validation_fraction=0.0)


def made(images=BYTES, labels=LABELS, test=None, **options):
    return data.from_arrays((images, labels), (images[:8], labels[:8]) if test is None else test, **options)


def batch(images, index, rng=None):
    return images.batch((images.images, images.labels), np.array(index), rng)


def test_bytes_are_normalized_with_the_statistics_of_the_training_images():
    dataset = made(test=(BYTES[:8] // 2, LABELS[:8]))
    scaled = BYTES.astype(np.float64) / 255
    mean, std = scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))
    np.testing.assert_allclose(dataset.preprocessing.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(dataset.preprocessing.std, std, rtol=1e-9)
    images, labels = batch(dataset.train, [3, 5])
    np.testing.assert_allclose(images, (scaled[[3, 5]] - mean) / std, atol=1e-5)
    assert labels.tolist() == [3, 1] and labels.dtype == np.int32
    images, _ = batch(dataset.test, [3])
    np.testing.assert_allclose(images, (BYTES[[3]] // 2 / 255 - mean) / std, atol=1e-5)
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("arrays", 4, (6, 5, 3))
    assert dataset.class_names is None and dataset.notes == ()


def test_statistics_of_many_images_are_summed_in_blocks():
    images = RNG.integers(0, 256, (2300, 3, 3, 1), np.uint8)
    dataset = made(images, np.arange(2300) % 2)
    np.testing.assert_allclose(dataset.preprocessing.mean, [images.mean() / 255], rtol=1e-9)
    np.testing.assert_allclose(dataset.preprocessing.std, [images.std() / 255], rtol=1e-9)


def test_given_mean_and_std_count():
    dataset = made(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images, _ = batch(dataset.train, [7])
    np.testing.assert_allclose(images, (BYTES[[7]] / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0], atol=1e-5)
    half = made(std=(1.0, 1.0, 1.0))
    assert half.preprocessing.std == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(half.preprocessing.mean, BYTES.mean((0, 1, 2)) / 255)


def test_sixteen_bits_are_scaled():
    images = RNG.integers(0, 65536, (40, 6, 5, 2), np.uint16)
    dataset = made(images, mean=(0.5, 0.25), std=(0.5, 2.0))
    expected = (images[[0, 9]] / 65535 - [0.5, 0.25]) / [0.5, 2.0]
    np.testing.assert_allclose(batch(dataset.train, [0, 9])[0], expected, atol=1e-5)
    assert dataset.serving()["scale"] == 1 / 65535


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(dtype):
    images = (100 * RNG.normal(size=(40, 6, 5, 3))).astype(dtype)
    dataset = made(images)
    np.testing.assert_array_equal(batch(dataset.train, range(40))[0], images.astype(np.float32))
    assert dataset.notes == (
        "The images are floating-point arrays; the network sees them as they are, without normalization.",
    )
    serving = dataset.serving()
    assert (serving["scale"], serving["mean"], serving["std"]) == (1.0, [0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize("images", [RNG.normal(size=(40, 6, 5, 3)).astype(np.float32), BYTES, 257 * np.uint16(BYTES)])
def test_augmentation_moves_pixels_of_any_type_and_changes_none(images):
    dataset = made(images, pad=2, mean=None if images.dtype == np.float32 else (0.0,) * 3, **NO_HOLD_OUT)
    with jax.default_matmul_precision("bfloat16"):
        crops = data.augment(jax.random.key(0), images, 2, True)
        shown, _ = batch(dataset.train, range(40), jax.random.key(0))
    assert crops.dtype == images.dtype
    assert all(len(find_crops(a, b, 2)) == 1 for a, b in zip(images, np.asarray(crops), strict=True))
    scale = 1 if images.dtype == np.float32 else np.iinfo(images.dtype).max
    np.testing.assert_allclose(np.asarray(shown) * dataset.preprocessing.std, np.asarray(crops) / scale, atol=1e-5)
    still = made(images, pad=0, flip=False)
    moved, unmoved = batch(still.train, [1], jax.random.key(0))[0], batch(still.train, [1])[0]
    np.testing.assert_allclose(moved, unmoved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "precision"), [(np.uint8, None), (np.uint16, "HIGHEST"), (np.float32, "HIGHEST")])
def test_pixels_that_no_bfloat16_holds_are_moved_at_the_highest_precision(dtype, precision):
    """CPUs always compute at the highest precision, so the traced program is checked instead."""
    program = jax.make_jaxpr(lambda images: data.augment(jax.random.key(0), images, 2, True))(BYTES.astype(dtype))
    found = [e.params["precision"] for e in program.eqns if e.primitive.name == "dot_general"]
    assert found == 2 * [precision and 2 * (jax.lax.Precision[precision],)]


def test_images_without_channels_get_one():
    dataset = made(BYTES[..., 0])
    assert dataset.image_shape == (6, 5, 1)
    assert dataset.train.images.shape == (40, 6, 5, 1)
    assert dataset.serving()["channel_order"] == "grey"


def test_lists_of_images_and_labels_are_arrays():
    dataset = made(list(BYTES), LABELS.tolist(), (list(BYTES[:2]), [3, 0]))
    np.testing.assert_array_equal(dataset.train.images, BYTES)
    assert dataset.test.labels.tolist() == [3, 0]


def test_splits_are_drawn_as_for_any_data_set():
    dataset = made(seed=3, search_fraction=0.25, validation_fraction=0.1)
    for name, expected in data.split(40, 3, 0.25, 0.1).items():
        np.testing.assert_array_equal(dataset.splits[name], expected)


def test_serving_says_what_must_be_done_to_an_image():
    dataset = made(class_names=["a", "b", "c", "d", "e"], name="letters", mean=(0.5, 0.25, 0.125), std=(1, 2, 4))
    assert dataset.num_classes == 5
    assert json.loads(json.dumps(dataset.serving())) == {
        "input_shape": [6, 5, 3],
        "channel_order": "rgb",
        "resize_size": None,
        "crop_size": None,
        "scale": 1 / 255,
        "mean": [0.5, 0.25, 0.125],
        "std": [1.0, 2.0, 4.0],
        "num_classes": 5,
        "class_names": ["a", "b", "c", "d", "e"],
    }
    serving = dataset.serving()
    served = (serving["scale"] * BYTES[:4] - serving["mean"]) / serving["std"]
    np.testing.assert_allclose(dataset.train.first(4), served, atol=1e-6)


# --- refusals ------------------------------------------------------------------------------------------------------


def spoiled(images, index, value):
    images = images.astype(np.float64)
    images[index, 2, 1, 0] = value
    return images


def ragged():
    objects = np.empty(40, object)
    objects[:] = list(BYTES)
    objects[17] = BYTES[17, :4]
    return objects


def boxed():
    objects = np.empty(40, object)
    objects[:] = list(BYTES)
    return objects


WRONG_IMAGES = {
    "nan": (
        spoiled(BYTES, 31, np.nan),
        "image 31 of train has a pixel that is not finite in float32; repair or remove",
    ),
    "inf": (spoiled(BYTES, 4, -np.inf), "image 4 of train has a pixel that is not finite in float32;"),
    "too large for float32": (spoiled(BYTES, 5, 1e300), "image 5 of train has a pixel that is not finite in float32;"),
    "several sizes": (
        ragged(),
        "image 17 of train has shape (4, 5, 3), and image 0 (6, 5, 3); give images of one size, or use from_folder.",
    ),
    "list of several sizes": (list(ragged()), "image 17 of train has shape (4, 5, 3), and image 0 (6, 5, 3);"),
    "objects": (boxed(), "the images of train are an array of Python objects; stack the images with np.stack."),
    "wide integers": (
        BYTES.astype(np.int64),
        "the images of train are of type int64; give uint8 (0..255), uint16 (0..65535), or floating-point numbers",
    ),
    "bool": (BYTES > 9, "the images of train are of type bool; give uint8"),
    "complex": (BYTES + 1j, "the images of train are of type complex128; give uint8"),
    "flat": (BYTES.reshape(40, -1), "the images of train have shape (40, 90); give (N, H, W, C) or (N, H, W)."),
    "channels first": (
        np.zeros((40, 3, 6, 6), np.uint8),
        "the images of train have shape (40, 3, 6, 6); images are (N, H, W, C), and these look like (N, C, H, W).",
    ),
    "none": (BYTES[:0], "the images of train have shape (0, 6, 5, 3); give (N, H, W, C) or (N, H, W)."),
}


@pytest.mark.parametrize(("images", "sentence"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_images_that_are_none_are_refused(images, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        made(images, test=(BYTES[:8], LABELS[:8]))


def test_images_of_few_rows_are_no_images_with_channels_first():
    rows = np.random.default_rng(0).normal(size=(40, 3, 8, 6)).astype(np.float32)
    assert made(rows, test=(rows[:8], LABELS[:8])).image_shape == (3, 8, 6)


def relabelled(index, label, dtype=np.int64):
    labels = LABELS.astype(dtype)
    labels[index] = label
    return labels


WRONG_LABELS = {
    "floats": (LABELS.astype(np.float32), "the labels of train are of type float32, the first is"),
    "names": (np.array(["cat"] * 40), "the labels of train are of type <U3, the first is"),
    "bool": (LABELS > 1, "the labels of train are of type bool"),
    "one-hot": (
        np.eye(4, dtype=np.int64)[LABELS],
        "the labels of train have shape (40, 4), as one-hot labels do; give the number of each image's class, "
        "labels.argmax(1).",
    ),
    "too few": (LABELS[:-1], "the labels of train have shape (39,); give one for each of its 40 images."),
    "one": (np.int64(3), "the labels of train have shape (); give one for each of its 40 images."),
    "negative": (relabelled(11, -1), "label 11 of train is -1; give whole numbers from 0."),
}


@pytest.mark.parametrize(("labels", "sentence"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_labels_that_are_none_are_refused(labels, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        made(labels=labels, test=(BYTES[:8], LABELS[:8]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(test=(BYTES[:3], [0, 4, 1])), "label 1 of test is 4; with 4 classes it must be from 0 to 3."),
        (dict(class_names="ab"), "label 2 of train is 2; with 2 classes it must be from 0 to 1."),
        (
            dict(labels=relabelled(9, 2**40), class_names="abcd"),
            "label 9 of train is 1099511627776; with 4 classes it must be from 0 to 3.",
        ),
        (
            dict(test=(BYTES[:8, :4], LABELS[:8])),
            "the images of train have shape (6, 5, 3), and those of test (4, 5, 3); give the same.",
        ),
        (
            dict(test=(BYTES[:8] / 255, LABELS[:8])),
            "the images of train have type uint8, and those of test float32; give the same.",
        ),
        (
            dict(images=BYTES / 255, mean=(0.5,) * 3),
            "mean and std are for images of 8 or 16 bits; floating-point ones are taken as they are.",
        ),
        (dict(mean=(0.5,)), "mean has 1 entries; the images of arrays have 3 channels."),
        (dict(images=0 * BYTES), "std=(0.0, 0.0, 0.0) must be above 0 in every entry."),
        (dict(pad=-1), "pad=-1 must be at least 0: a number of pixels."),
        (dict(seed=-1), "seed=-1 must be at least 0."),
        (
            dict(search_fraction=1.0),
            "search_fraction=1.0 must be in [0, 1): a fraction of the training images.",
        ),
    ],
)
def test_impossible_arguments_are_named(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        made(**options)


def test_a_data_set_of_ones_own_must_have_labels_that_are_classes():
    images = data.InMemory(BYTES, np.int32(LABELS), data.Preprocessing((0.5,) * 3, (0.5,) * 3))
    fields = dict(name="own", image_shape=(6, 5, 3), train=images, test=images, splits=data.split(40, 0, 0.1, 0.1))
    fields |= dict(preprocessing=data.Preprocessing((0.5,) * 3, (0.5,) * 3))
    assert data.Dataset(num_classes=4, **fields).class_names is None
    with pytest.raises(ValueError, match=r"^label 3 of train is 3; with 3 classes it must be from 0 to 2\.$"):
        data.Dataset(num_classes=3, **fields)
    with pytest.raises(ValueError, match=r"^class_names has 2 names for 4 classes\.$"):
        data.Dataset(num_classes=4, class_names=("a", "b"), **fields)


# --- imports -------------------------------------------------------------------------------------------------------


def imported_by(code, *names):
    code = f"import sys; {code}; print([name for name in {names!r} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_library_is_imported_without_the_data_sets_packages():
    assert ddnp_jax.data is data
    decoders = ("tensorflow_datasets", "grain", "PIL", "cv2", "simplejpeg", "ddnp_jax.data")
    assert imported_by("import ddnp_jax", *decoders) == "[]"
    assert imported_by("import ddnp_jax; ddnp_jax.data.from_arrays", "tensorflow_datasets", "grain") == "['grain']"
    with pytest.raises(AttributeError, match=r"^module 'ddnp_jax' has no attribute 'dataa'$"):
        getattr(ddnp_jax, "dat" + "aa")
