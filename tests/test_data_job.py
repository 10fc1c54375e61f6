"""The main job on images of one's own: arrays, floating-point ones too, and a folder on the command line."""

import flax.linen as nn
import numpy as np
import pytest

from configs import digits_r20
from ddnp_jax import data, pipeline
from tests.test_data_folder import fill


class Small(nn.Module):
    """A user's network."""

    channels: tuple = (8,)

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train, name="norm")(nn.Conv(self.channels[0], (3, 3), name="first")(x)))
        return nn.Dense(2, name="classes")(x.mean((1, 2)))


@pytest.fixture
def config():
    config = digits_r20.get_config("uniform")
    config.update({"eval_batch_size": 16, "base": {"epochs": 12, "batch_size": 16, "warmup_epochs": 0.0}})
    config.finetune.update(epochs=1, batch_size=16, warmup_epochs=0.0)
    config.search.batch_size = 16
    return config


def bright_and_dark(count, seed):
    """Images of two classes that a network tells apart at once."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(seed).integers(0, 100, (count, 6, 6, 3))
    return np.uint8(noise + 150 * labels[:, None, None, None]), labels


def test_arrays_of_ones_own(config, tmp_path):
    (images, labels), (tested, test_labels) = bright_and_dark(96, 0), bright_and_dark(32, 1)
    arrays = (images / 255 - 0.5, labels), (tested / 255 - 0.5, test_labels)
    dataset = data.from_arrays(*arrays, name="bright", search_fraction=0.3, pad=1)
    report = pipeline.run(config, tmp_path, Small(), lambda widths: Small(widths), dataset)
    assert (report["dataset"], report["test_images"]) == ("bright", 32)
    assert report["pruned_top1"] == 100
    assert report["widths"] < report["widths_before"]
    assert dataset.notes[0] in report["notes"]


def test_a_folder_takes_the_place_of_the_configurations_data_set(config, tmp_path):
    for i, name in enumerate(("cat", "dog")):
        fill(tmp_path / "pets", *(f"{name}/{j}.png" for j in range(60)), first_seed=100 * i)
    config.data.update(name="folder", data_dir=str(tmp_path / "pets"), mean=(0.5,) * 3, std=(0.5,) * 3)
    job = pipeline.prepare(config, tmp_path / "run", Small(), lambda widths: Small(widths))
    assert (job.dataset.name, job.dataset.class_names) == ("pets", ("cat", "dog"))
    assert job.topology.input_shape == (12, 12, 3)
