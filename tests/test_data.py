"""Data sets: reading, splits, order, padding, augmentation, and errors if data are missing."""

import io
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ddnp_jax import data
from ddnp_jax.config import DataConfig
from ddnp_jax.data import prepared
from ddnp_jax.data.cifar10 import Cifar10

REPOSITORY = Path(__file__).parents[1]


def make_config(**fields):
    own = dict(name="digits", validation_fraction=0.1, mean=(0.305,), std=(0.376,), pad=2, flip=False)
    return DataConfig(**own | fields)


CIFAR10 = dict(name="cifar10", mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.load(make_config(data_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def digits(digits_dir):
    return data.load(make_config(data_dir=str(digits_dir)))


# --- the data sets -------------------------------------------------------------------------------------------------


def test_digits_are_the_scans_of_scikit_learn(digits):
    scans = load_digits()
    is_test = np.zeros(1797, bool)
    seen = [0] * 10
    for i, label in enumerate(scans.target):
        seen[label] += 1
        is_test[i] = seen[label] % 5 == 0
    gray = {0: 0, 1: 16, 4: 64, 8: 128, 15: 239, 16: 255}  # level of the scan -> byte
    for images, labels, rows in (
        (digits.train.images, digits.train.labels, ~is_test),
        (digits.test.images, digits.test.labels, is_test),
    ):
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        np.testing.assert_array_equal(labels, scans.target[rows])
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):  # every pixel is repeated 2 x 2
            pixels = images[:, dy::2, dx::2, 0]
            np.testing.assert_allclose(pixels / 255 * 16, scans.images[rows], atol=0.5 * 16 / 255 + 1e-9)
            for level, byte in gray.items():
                np.testing.assert_array_equal(pixels[scans.images[rows] == level], byte)
    assert digits.train.images.shape == (1442, 16, 16, 1)
    assert digits.test.images.shape == (355, 16, 16, 1)
    assert (digits.name, digits.num_classes, digits.image_shape) == ("digits", 10, (16, 16, 1))
    assert np.bincount(digits.test.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]


def test_a_slice_of_the_training_images(digits_dir):
    whole = data.load(make_config(data_dir=str(digits_dir)))
    part = data.load(make_config(data_dir=str(digits_dir), train_split="train[100:300]", search_fraction=0.25))
    np.testing.assert_array_equal(part.train.images, whole.train.images[100:300])
    assert {name: len(indices) for name, indices in part.splits.items()} == {
        "train": 130,
        "search": 50,
        "validation": 20,
    }
    assert len(part.test) == 355


def test_two_processes_prepare_digits_at_once(tmp_path):
    code = (
        "import sys; from ddnp_jax import data; from ddnp_jax.config import DataConfig; sys.stdin.readline();"
        "print(data.load(DataConfig(name='digits', data_dir=sys.argv[1])).train.images.sum())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    workers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1


def test_a_preparation_that_another_process_finished_first_is_used(tmp_path, digits_dir, monkeypatch):
    def lose_the_race(builder, **_):
        Path(builder.data_dir).parent.mkdir(parents=True)
        Path(builder.data_dir).symlink_to(digits_dir / "digits" / "1.0.0")
        raise OSError("Directory not empty")

    monkeypatch.setattr(prepared.BUILDERS["digits"], "download_and_prepare", lose_the_race)
    assert len(data.load(make_config(data_dir=str(tmp_path))).train.images) == 1442


def test_cifar10_jpeg_has_50000_and_8000_images(shared):
    dataset = data.load(make_config(**CIFAR10, data_dir=str(shared / "tfds")))
    assert dataset.train.images.shape == (50000, 32, 32, 3) and dataset.train.images.dtype == np.uint8
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert dataset.test.images.shape == (8000, 32, 32, 3)
    assert np.bincount(dataset.test.labels).tolist() == [800] * 10
    assert {name: len(part) for name, part in dataset.splits.items()} == {
        "train": 42500,
        "search": 2500,
        "validation": 5000,
    }
    source = tfds.builder("cifar10", data_dir=shared / "tfds").as_data_source("train")
    for i in (0, 999, 1000, 49999):  # TFDS's own decoder, at the borders of the blocks that are read
        record = source[i]
        np.testing.assert_array_equal(dataset.train.images[i], record["image"])
        assert dataset.train.labels[i] == record["label"]


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's binary format, served on the loopback address as TFDS's source."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 32, 32), np.uint8)
    labels = rng.permutation(12).astype(np.uint8) % 10
    records = np.concatenate([labels[:, None], images.reshape(12, -1)], 1)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    files = {f"data_batch_{i + 1}.bin": records[2 * i : 2 * i + 2].tobytes() for i in range(5)}
    files |= {
        "test_batch.bin": records[10:].tobytes(),
        "batches.meta.txt": (names.replace(" ", "\n") + "\n\n").encode(),
    }
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cifar.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_cifar10_to(f"http://127.0.0.1:{server.server_port}/cifar.tar.gz", monkeypatch)
    yield images.transpose(0, 2, 3, 1), labels
    server.shutdown()
    server.server_close()


def point_cifar10_to(url, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    original = tfds.image_classification.Cifar10._cifar_info
    monkeypatch.setattr(Cifar10, "_cifar_info", property(lambda self: original.fget(self)._replace(url=url)))


def test_cifar10_is_downloaded_and_prepared_without_tensorflow(cifar_archive, tmp_path):
    images, labels = cifar_archive
    builder = Cifar10(data_dir=tmp_path / "tfds")
    builder.download_and_prepare(file_format="array_record")
    config = make_config(**CIFAR10, data_dir=str(tmp_path / "tfds"), search_fraction=0.2)
    dataset = data.load(config)
    assert "tensorflow" not in sys.modules
    assert dataset.train.images.shape == (10, 32, 32, 3) and dataset.test.images.shape == (2, 32, 32, 3)
    # TFDS shuffles the records as it writes them; the ids tell which is which.
    public = tfds.builder("cifar10", data_dir=tmp_path / "tfds")
    assert public.info.features["label"].names[:2] == ["airplane", "automobile"]
    for split, first, read_images, read_labels in (
        ("train", 0, dataset.train.images, dataset.train.labels),
        ("test", 10, dataset.test.images, dataset.test.labels),
    ):
        ids = [record["id"].decode() for record in public.as_data_source(split)]
        assert sorted(ids) == [f"{split}_{i:05d}" for i in range(len(ids))]
        rows = [first + int(name[-5:]) for name in ids]
        np.testing.assert_array_equal(read_images, images[rows])
        np.testing.assert_array_equal(read_labels, labels[rows])


def test_cifar10_keeps_the_published_checksum():
    assert Cifar10.url_infos == tfds.image_classification.Cifar10.url_infos
    assert str(next(iter(Cifar10.url_infos.values())).checksum).startswith("c4a38c50a1bc5f3a")


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        (
            {"name": "cifar11"},
            ValueError,
            "data.name='cifar11' is unknown; use cifar10, digits, imagenet2012, 'folder', or the name of a data set "
            "that TFDS knows or that is prepared in data.data_dir.",
        ),
        (
            {"search_fraction": 1.5},
            ValueError,
            "data.search_fraction=1.5 must be in [0, 1): a fraction of the training images.",
        ),
        (
            {"search_fraction": 0.5, "validation_fraction": 0.5},
            ValueError,
            "data.search_fraction=0.5 and data.validation_fraction=0.5 leave no training images; "
            "their sum must be below 1.",
        ),
        ({"mean": (0.5, 0.5, 0.5)}, ValueError, "data.mean has 3 entries; the images of digits have 1 channels."),
        *(
            (
                {"train_split": split},
                ValueError,
                f"data.train_split={split!r} is not a part of digits (train: 1442 images, test: 355 images); use the "
                "name of a split, or a slice of one in TFDS's form, 'train[:2000]' or 'train[10%:20%]'.",
            )
            for split in (
                *("trian", "train+test", "train[:9]+test"),
                *("train[:x]", "train[:0]", "train[:1443]", "train[5:5]", "train[101:100]"),
            )
        ),
        (
            {"train_split": "test"},
            ValueError,
            "data.train_split='test' and data.test_split='test' have images in common; give parts that have none.",
        ),
        ({"seed": -1}, ValueError, "data.seed=-1 must be at least 0."),
        ({"std": (0.0,)}, ValueError, "data.std=(0.0,) must be above 0 in every entry."),
        ({"pad": -1}, ValueError, "data.pad=-1 must be at least 0: a number of pixels."),
        ({"crop_size": 257}, ValueError, "data.crop_size=257 must be from 1 to data.resize_size=256 pixels."),
        (
            {"threads": -1},
            ValueError,
            "data.threads=-1 must be at least 0: how many threads; 0 is one per core.",
        ),
    ],
)
def test_impossible_fields_are_named(digits_dir, fields, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        data.load(make_config(data_dir=str(digits_dir), **fields))


@pytest.mark.parametrize("made", [None, "", "cifar10/3.0.2"], ids=["missing", "empty", "empty version"])
def test_missing_and_empty_folders_are_named(tmp_path, made):
    folder = tmp_path / "nowhere"
    if made is not None:
        (folder / made).mkdir(parents=True)
    sentence = (
        f"data.data_dir='{folder}' holds no prepared cifar10 ({folder}/cifar10/3.0.2 has no dataset_info.json); set it "
        "to a folder with TFDS's prepared data in the array_record format, or leave it empty for a download."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(sentence)}$"):
        data.load(make_config(**CIFAR10, data_dir=str(folder)))
    assert folder.exists() == (made is not None)


def test_without_a_network_the_download_says_what_was_tried(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/cifar.tar.gz"  # the discard port: nobody listens
    point_cifar10_to(url, monkeypatch)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    sentence = (
        f"cifar10 could not be prepared in {tmp_path}/cifar10/3.0.2 ({url} did not answer: ConnectionError); set "
        "data.data_dir to a folder that holds its prepared TFDS data."
    )
    with pytest.raises(OSError, match=f"^{re.escape(sentence)}$"):
        data.load(make_config(**CIFAR10))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        OSError, match=r"^digits could not be prepared in .*/file/digits/1.0.0 .*; set data.data_dir to"
    ):
        data.load(make_config(data_dir=str(tmp_path / "file")))


@pytest.mark.parametrize("content", [None, "tfrecord"], ids=["incomplete", "other format"])
def test_a_data_set_that_cannot_be_read_is_named(tmp_path, digits_dir, content):
    folder = tmp_path / "digits" / "1.0.0"
    if content is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(digits_dir / "digits" / "1.0.0", folder)
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", content))
    sentence = (
        f"{folder} exists but is not a complete data set in TFDS's array_record format; move it away, or set "
        "data.data_dir to another folder."
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(sentence)}$"):
        data.load(make_config(data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("batch_size", "process", "sentence"),
    [
        (11, (0, 1), "batch_size=11 must be between 1 and the 10 images to draw from."),
        (0, (0, 1), "batch_size=0 must be between 1 and the 10 images to draw from."),
        (5, (0, 2), "batch_size=5 cannot be divided among 2 processes; use a multiple."),
    ],
)
def test_impossible_batches_are_named(batch_size, process, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        data.batches(np.arange(10), batch_size, 0, process=process)


# --- splits and order ----------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(0, 2**32), st.floats(0, 0.4), st.floats(0, 0.4))
@settings(deadline=None)
def test_splits_hold_every_image_once(count, seed, search, validation):
    parts = data.split(count, seed, search, validation)
    assert len(parts["search"]) == round(search * count)
    assert len(parts["validation"]) == round(validation * count)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(count))
    for part in parts.values():
        assert part.dtype == np.int32
        assert (np.diff(part) > 0).all()
    np.testing.assert_array_equal(data.split(count, seed, search, 0)["search"], parts["search"])


def test_splits_follow_the_seed(digits):
    assert {name: len(part) for name, part in digits.splits.items()} == {"train": 1226, "search": 72, "validation": 144}
    again, other = (data.split(1442, seed, 0.05, 0.1)["search"] for seed in (0, 1))
    np.testing.assert_array_equal(digits.splits["search"], again)
    assert len(np.intersect1d(again, other)) < 20
    assert np.ptp(again) > 1000  # drawn from everywhere


@st.composite
def orders(draw):
    processes = draw(st.integers(1, 4))
    count = draw(st.integers(4 * processes, 60))
    batch_size = processes * draw(st.integers(1, count // processes))
    return count, batch_size, draw(st.integers(0, 2**32)), processes


def draw(steps, *args, **kwargs):
    """Indices and epochs, (steps, batch), of `data.batches`."""
    batches = data.batches(*args, **kwargs)
    return tuple(map(np.stack, zip(*(batches[step] for step in steps), strict=True)))


@given(orders())
@settings(deadline=None)
def test_every_epoch_uses_every_image_once_over_all_processes(order):
    count, batch_size, seed, processes = order
    indices = np.random.default_rng(0).choice(1000, count, replace=False)
    steps = range(-(-3 * count // batch_size))
    parts = [draw(steps, indices, batch_size, seed, process=(rank, processes)) for rank in range(processes)]
    shape = (len(steps), batch_size // processes)
    assert all(x.shape == shape and x.dtype == np.int32 for part in parts for x in part)
    stream, epochs = (np.concatenate(x, axis=1).reshape(-1) for x in zip(*parts, strict=True))  # process 0's part first
    np.testing.assert_array_equal(epochs, np.arange(len(stream)) // count)
    for epoch in range(3):
        seen = stream[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(seen), np.sort(indices))
    # As many processes as one likes: the global batches are those of a single process.
    alone, _ = draw(steps, indices, batch_size, seed)
    np.testing.assert_array_equal(stream, alone.reshape(-1))


@given(orders(), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(order, step):
    count, batch_size, seed, processes = order
    process = (processes - 1, processes)
    used, fresh = (data.batches(np.arange(count), batch_size, seed, process=process) for _ in "ab")
    first = used[0].image.copy()
    np.testing.assert_array_equal(used[step], fresh[step])
    np.testing.assert_array_equal(used[0].image, first)
    expected = fresh[step].image.copy()
    used[step].image[:] = -1  # an element is the caller's own
    np.testing.assert_array_equal(used[step].image, expected)


def test_shuffles_are_global_and_differ_by_epoch_and_seed():
    count = 2000
    epochs = {
        (seed, epoch): data.batches(np.arange(count), count, seed)[epoch].image
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    for order in epochs.values():
        assert 500 < np.abs(order - np.arange(count)).mean() < 850  # two independent ranks differ by count / 3
    different = [np.mean(a != b) for i, a in epochs.items() for j, b in epochs.items() if i != j]
    assert min(different) > 0.99  # in particular: epoch 1 of seed 0 is not epoch 0 of seed 1


def test_steps_per_epoch():
    assert data.steps_per_epoch(50000, 128) == 391
    assert data.steps_per_epoch(256, 128) == 2
    assert data.steps_per_epoch(257, 128) == 3


def evaluated(indices, batch_size, **kwargs):
    """Indices and validity, (batches, batch), of `data.evaluation_batches`."""
    elements = list(data.evaluation_batches(indices, batch_size, **kwargs))
    return np.stack([draws.image for draws, _ in elements]), np.stack([valid for _, valid in elements])


def test_evaluation_batches_pad_the_last_batch():
    indices, valid = evaluated(np.array([7, 1, 2, 5, 4]), 3)
    assert indices.tolist() == [[7, 1, 2], [5, 4, 7]] and indices.dtype == np.int32
    assert valid.tolist() == [[True, True, True], [True, True, False]]


@given(orders())
@settings(deadline=None)
def test_evaluation_is_exact_over_all_processes(order):
    count, batch_size, seed, processes = order
    indices = np.random.default_rng(seed).choice(1000, count, replace=False)
    parts = [evaluated(indices, batch_size, process=(rank, processes)) for rank in range(processes)]
    found, valid = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    assert found.shape == valid.shape == (-(-count // batch_size), batch_size)
    np.testing.assert_array_equal(found[valid], indices)
    assert np.isin(found, indices).all()


# --- pixels --------------------------------------------------------------------------------------------------------


def test_normalize():
    images = np.array([[[[0, 255, 51]]]], np.uint8)
    out = data.normalize(images, (0.5, 0.25, 0.2), (0.5, 0.125, 0.4))
    np.testing.assert_allclose(out, [[[[-1.0, 6.0, 0.0]]]], atol=1e-6)
    assert out.dtype == jnp.float32


def find_crops(image, out, pad):
    """All (row, column, mirrored) for which `out` is that crop of the zero-padded `image`."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    height, width, _ = image.shape
    return [
        (row, column, mirrored)
        for row in range(2 * pad + 1)
        for column in range(2 * pad + 1)
        for mirrored in (False, True)
        if np.array_equal(padded[row : row + height, column : column + width][:, :: -1 if mirrored else 1], out)
    ]


@pytest.mark.parametrize(("pad", "flip", "shape"), [(2, True, (9, 7, 3)), (1, False, (8, 8, 1)), (0, True, (5, 6, 3))])
def test_augment_is_a_crop_of_the_padded_image_each_equally_often(pad, flip, shape):
    count = 3000
    images = np.random.default_rng(0).integers(1, 256, (count, *shape), dtype=np.uint8)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 0, 255
    out = np.asarray(jax.jit(data.augment, static_argnums=(2, 3))(jax.random.key(0), images, pad, flip))
    assert out.dtype == np.uint8 and out.shape == images.shape
    crops = [find_crops(image, crop, pad) for image, crop in zip(images, out, strict=True)]
    assert all(len(found) == 1 for found in crops)
    rows, columns, mirrored = np.array([found[0] for found in crops]).T
    kinds = (2 * pad + 1) ** 2 * (2 if flip else 1)
    frequency = np.unique(np.stack([rows, columns, mirrored]), axis=1, return_counts=True)[1]
    assert len(frequency) == kinds  # every crop occurs, none far from its share: rows, columns and flips independent
    expected = count / kinds
    assert np.abs(frequency - expected).max() < 5 * np.sqrt(expected)


def test_augment_is_a_function_of_its_key():
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    first, again, other = (np.asarray(data.augment(jax.random.key(i), images, 2, True)) for i in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other, axis=(1, 2, 3)).mean() > 0.9


def test_augment_without_pad_and_flip_changes_nothing():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(data.augment(jax.random.key(0), images, 0, False), images)


def test_augment_keeps_every_byte_at_the_lowest_matrix_precision():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    with jax.default_matmul_precision("bfloat16"):
        np.testing.assert_array_equal(data.augment(jax.random.key(0), images, 0, False), images)


def test_importing_starts_no_device():
    code = "import jax; from ddnp_jax import data; from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_networks_that_see_blue_first_get_it_so():
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    section = ml_collections.ConfigDict(
        {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3, "pad": 0, "flip": False, "bgr": True}
    )
    arrays = pixels, np.zeros(1, np.int32)
    images, _ = data.InMemory(*arrays, section).batch(arrays, np.array([0]), None)
    np.testing.assert_allclose(images[0, 0], [[2, 1, 0], [5, 4, 3]], atol=1e-5)
