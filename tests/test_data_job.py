"""The main job on custom images: arrays, also floating-point ones, and a folder on the command line."""

import flax.linen as nn
import numpy as np
import pytest

import ddnp_jax
from configs import digits_r20
from ddnp_jax import data, pipeline
from ddnp_jax.topology import Selection
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


def test_prune_selects_what_the_job_selects(config, tmp_path):
    """The same network, batches and seed, in a script and in the job over eight devices."""
    config = digits_r20.get_config("scalar")
    config.update({"seed": 3, "eval_batch_size": 16, "base": {"epochs": 2, "batch_size": 16, "warmup_epochs": 0.0}})
    config.search.update(batch_size=16, epochs=20, chunk_steps=4)
    config.finetune.update(epochs=0, warmup_epochs=0.0)
    (images, labels), tested = bright_and_dark(96, 0), bright_and_dark(32, 1)
    dataset = data.from_arrays((images, labels), tested, name="bright", search_fraction=0.3, pad=1)
    pipeline.run(config, tmp_path, Two(), dataset=dataset)
    job = pipeline.prepare(config, tmp_path, Two(), dataset=dataset)
    variables = pipeline.stages.base(job)
    steps, _ = job.stage_steps("search")
    drawn = data.batches(dataset.splits["search"], 16, config.seed)
    batches = [
        dataset.train.batch(dataset.train.on_devices, dataset.train.read(drawn[step], None), None)
        for step in range(steps)
    ]
    fields = {"importance": "scalar", "width": "scalar", "resource_weight": config.search.resource_weight}
    rates = {f"{side}_optimizer": config.search[f"{side}_optimizer"].to_dict() for side in ("importance", "width")}
    pruned = ddnp_jax.prune(
        Two(), variables, batches, config.budget.p, steps=steps, seed=3, progress=False, **fields, **rates
    )
    assert pruned.selection == Selection.load(tmp_path / "selection.json")
    assert pruned.selection.kept != tuple(tuple(range(width)) for width in pruned.selection.widths)


class Two(nn.Module):
    """A network with two gates."""

    @nn.compact
    def __call__(self, x, train):
        for i, features in enumerate((8, 12)):
            x = nn.Conv(features, (3, 3), name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(not train, name=f"norm{i}")(x))
        return nn.Dense(2, name="classes")(x.mean((1, 2)))


class TwoOutputs(nn.Module):
    """A network that returns an embedding beside its logits."""

    classes: int = 2

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train, name="norm")(nn.Conv(8, (3, 3), name="first")(x)))
        x = x.mean((1, 2))
        return {"embedding": nn.Dense(5, name="embed")(x), "logits": nn.Dense(self.classes, name="classes")(x)}


def test_one_of_several_outputs_is_trained_and_counted(config, tmp_path):
    (images, labels), tested = bright_and_dark(96, 0), bright_and_dark(32, 1)
    dataset = data.from_arrays((images, labels), tested, name="bright", search_fraction=0.3, pad=1)
    report = pipeline.run(config, tmp_path / "run", TwoOutputs(), dataset=dataset, outputs="logits")
    assert report["pruned_top1"] == 100
    with pytest.raises(ValueError, match=r"TwoOutputs returns \['embedding'\].* select one of them with outputs="):
        pipeline.prepare(config, tmp_path / "none", TwoOutputs(), dataset=dataset)
    message = r"TwoOutputs returns \(1, 8\) for one image, and bright has 2 classes; give it 2 outputs"
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(config, tmp_path / "eight", TwoOutputs(8), dataset=dataset, outputs="logits")
    assert not (tmp_path / "eight").exists()
