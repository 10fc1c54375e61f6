"""Streamed photographs: the same steps as from memory, with any number of threads, and ImageNet's format."""

import io
import re
import tarfile

import jax
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddnp_jax import data, parallel, training
from ddnp_jax.config import DataConfig
from ddnp_jax.data import imagenet2012
from ddnp_jax.training import evaluation
from tests.test_photos import encode, smooth
from tests.test_training import recording_state, recording_step

CONFIG = ml_collections.ConfigDict(
    {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "bgr": False,
        "pad": 0,
        "flip": True,
        "crop_size": 12,
        "resize_size": 12,
        "threads": 3,
    }
)
RECORDS = [{"image": encode(smooth(12, 12, seed=i), "PNG"), "label": i % 10} for i in range(40)]
STREAMED = data.Streamed(RECORDS, CONFIG)
IN_MEMORY = data.InMemory(
    np.stack([smooth(12, 12, seed=i) for i in range(40)]), np.arange(40, dtype=np.int32) % 10, CONFIG
)


def numbered(index, epoch):
    return data.BatchIndices(np.int32(index), np.int32(epoch))


def steps(images, lengths, threads=3, seed=None):
    """The recording step on batches of 16 of 40 images, with the complete training loop."""
    chunk = parallel.data_parallel(training.chunk_of(recording_step, images, seed=5, augment=False))
    constants = {"images": images.on_devices, "step": parallel.replicate(np.float32(0.1))}
    state, batches = parallel.replicate(recording_state()), data.batches(np.arange(40), 16, seed=0)
    metrics, first = [], 0
    for length in lengths:
        span = batches[first : first + length]
        with data.read_ahead(span, lambda indices: images.read(indices, seed), threads, length) as chunks:
            for sent in chunks:
                state, measured = chunk(state, constants, parallel.shard_batches(sent))
                metrics.append(parallel.fetch(measured))
        first += length
    return jax.tree.map(lambda *parts: np.concatenate(parts), *metrics)


def test_steps_cannot_tell_a_stream_from_memory():
    streamed, resident = steps(STREAMED, [6]), steps(IN_MEMORY, [6], threads=0)
    for name in resident:
        np.testing.assert_allclose(streamed[name], resident[name], rtol=1e-6, err_msg=name)
    assert len(set(streamed["red"])) == 6


def test_evaluation_cannot_tell_a_stream_from_memory():
    weights = np.float32(np.random.default_rng(3).normal(size=(432, 10)))
    chosen = np.random.default_rng(1).permutation(40)[:37]

    def forward(variables, images):
        return images.reshape(images.shape[0], -1) @ variables

    streamed, resident = (
        evaluation.evaluator(forward, images, 16, "shard_map")(weights, chosen) for images in (STREAMED, IN_MEMORY)
    )
    assert streamed == pytest.approx(resident)
    assert 0 < resident["top1"] < 100


def test_augmented_steps_go_on_bit_for_bit_in_any_threads_and_chunks():
    whole = steps(STREAMED, [1] * 6, threads=0, seed=7)
    for lengths, threads in (([1] * 6, 3), ([1, 1, 1], 1)):
        for name, values in steps(STREAMED, lengths, threads, seed=7).items():
            np.testing.assert_array_equal(values, whole[name][: len(lengths)])
    other = steps(STREAMED, [1] * 6, seed=8)
    assert np.all(other["red"] != whole["red"])


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone():
    alone, _ = STREAMED.read(numbered([5], [2]), seed=1)
    among, labels = STREAMED.read(numbered([9, 5, 5, 3], [0, 2, 3, 2]), seed=1)
    np.testing.assert_array_equal(among[1], alone[0])
    assert labels.tolist() == [9, 5, 5, 3] and labels.dtype == np.int32
    assert np.any(among[2] != alone[0])
    assert np.any(STREAMED.read(numbered([5], [2]), seed=2)[0] != alone)


def test_chunks_come_in_order_whoever_is_fast():
    batches = data.batches(np.arange(40), 8, seed=0)[:11]
    with data.read_ahead(batches, lambda indices: indices.image, 4, 3) as chunks:
        parts = list(chunks)
    assert [part.shape for part in parts] == [(3, 8), (3, 8), (3, 8), (2, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), [batches[step].image for step in range(11)])


def test_a_damaged_record_is_named():
    records = [RECORDS[0], {"image": b"no image", "label": 1}]
    with pytest.raises(ValueError, match=r"^record 1 of the data set cannot be decoded \(.*\); repair or remove it\.$"):
        data.Streamed(records, CONFIG).read(numbered([0, 1], [0, 0]), None)


# --- ImageNet ------------------------------------------------------------------------------------------------------


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def make_config(folder, **fields):
    held_out = {"name": "imagenet2012", "data_dir": str(folder), "search_fraction": 0.2, "validation_fraction": 0.1}
    sizes = {"crop_size": 224, "resize_size": 256}
    return DataConfig(**{**CONFIG.to_dict(), **held_out, **sizes, **fields})


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet's two archives with 6 + 4 images of two classes, and the labels that TFDS has for them."""
    classes = ("n01440764", "n01443537")
    labels = ("n01443537", "n01440764", "n01440764", "n01443537")  # of the validation images in alphabetical order
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    modes = ("RGB", "L", "CMYK")
    train = {
        f"{name}.tar": write_tar(
            tmp_path / name, {f"{name}_{i}.JPEG": encode(smooth(40, 50, seed=i), mode=modes[i]) for i in range(3)}
        )
        for name in classes
    }
    write_tar(folder / imagenet2012.TRAIN_ARCHIVE, train)
    validation = {f"ILSVRC2012_val_{i}.JPEG": encode(smooth(50, 40, seed=i)) for i in (3, 1, 2, 0)}
    write_tar(folder / imagenet2012.VALIDATION_ARCHIVE, validation)
    for name, lines in (("labels.txt", classes), ("validation_labels.txt", labels)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(imagenet2012, "_tfds_file", lambda name: str(tmp_path / name))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    return tmp_path


def test_imagenet_is_prepared_from_its_archives_without_tensorflow(archives):
    dataset = data.load(make_config("", crop_size=32, resize_size=40, search_fraction=0.5))
    assert (dataset.num_classes, dataset.image_shape) == (2, (32, 32, 3))
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    public = tfds.builder("imagenet2012", data_dir=archives)
    for split, images in (("train", dataset.train), ("validation", dataset.test)):
        records = public.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        pixels, labels = images.read(numbered(range(len(images)), [0] * len(images)), None)
        for record, image, label in zip(records, pixels, labels, strict=True):
            assert label == record["label"]
            shown = Image.open(io.BytesIO(record["image"])).convert("RGB")
            left, top = (shown.width - 32) // 2, (shown.height - 32) // 2  # the shorter side is 40 already
            np.testing.assert_array_equal(image, np.asarray(shown)[top : top + 32, left : left + 32])
    labels = {r["file_name"].decode(): int(r["label"]) for r in public.as_data_source("validation")}
    assert labels == {f"ILSVRC2012_val_{i}.JPEG": label for i, label in enumerate((1, 0, 0, 1))}
    labels = {r["file_name"].decode(): int(r["label"]) for r in public.as_data_source("train")}
    assert labels == {f"{name}_{i}.JPEG": c for c, name in enumerate(("n01440764", "n01443537")) for i in range(3)}


def test_missing_archives_are_named(archives):
    (archives / "downloads" / "manual" / imagenet2012.VALIDATION_ARCHIVE).unlink()
    with pytest.raises(OSError, match=r"imagenet2012 could not be prepared in .*ILSVRC2012_img_val\.tar is missing"):
        data.load(make_config(""))


def test_a_missing_folder_of_archives_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(OSError, match=re.escape(f"{tmp_path}/downloads/manual does not exist")):
        data.load(make_config(""))


def test_imagenet_sample(shared):
    dataset = data.load(make_config(shared / "tfds"))
    assert (dataset.num_classes, dataset.image_shape) == (1000, (224, 224, 3))
    assert (len(dataset.train), len(dataset.test)) == (500, 200)
    assert {name: len(part) for name, part in dataset.splits.items()} == {"train": 350, "search": 100, "validation": 50}
    records = tfds.builder("imagenet2012", data_dir=shared / "tfds").as_data_source("validation")
    chosen = [0, 7, 100, 199]
    pixels, labels = dataset.test.read(numbered(chosen, [0] * 4), None)
    for i, image, label in zip(chosen, pixels, labels, strict=True):
        whole = Image.fromarray(records[i]["image"])  # TFDS's own decoder
        shorter = min(whole.size)
        resized = whole.resize([256 * side // shorter for side in whole.size], Image.Resampling.BILINEAR)
        left, top = (round((side - 224) / 2) for side in resized.size)
        np.testing.assert_array_equal(image, np.asarray(resized)[top : top + 224, left : left + 224])
        assert label == records[i]["label"]
    batch = dataset.test.batch(dataset.test.on_devices, (pixels, labels), None)[0]
    expected = (pixels / 255 - np.array(CONFIG.mean)) / np.array(CONFIG.std)
    np.testing.assert_allclose(batch, expected, atol=1e-5)
    augmented, _ = dataset.train.read(numbered(range(16), [0] * 16), seed=0)
    assert augmented.shape == (16, 224, 224, 3) and augmented.std((1, 2, 3)).min() > 5
