"""The main job on scanned digits: its report, resuming after every kind of end, and its refusals."""

import importlib
import json
import os
import re
import shutil
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from configs import cifar10_r56, default, digits_r20, imagenet_r50, own
from ddnp_jax import cpu, data, models, parallel, pipeline, preemption
from ddnp_jax.checkpoint import Checkpoints
from ddnp_jax.config import Config, typed
from ddnp_jax.cost import latency, timing
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.networks import as_network
from ddnp_jax.pipeline import stages
from ddnp_jax.saved import load_pruned, save_pruned
from experiments import launch
from tests.small_job import Own, P, interrupt_at, tiny
from tests.test_data_folder import fill
from tests.test_training import events_of

TUNED = ("finetune", "control")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def config(data_dir):
    return tiny(data_dir)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """An uninterrupted run: (workdir, report)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, pipeline.run(tiny(data_dir), workdir)


def leaves(workdir):
    _, variables = load_pruned(workdir / "pruned")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(variables)}


def assert_same_network(workdir, other):
    ours, theirs = leaves(workdir), leaves(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def log_of(workdir):
    """The log without rates."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "crc")} for line in lines]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill():
    raise Killed


def test_report_says_what_the_pruned_network_does(finished, config):
    workdir, report = finished
    assert report == json.loads((workdir / "report.json").read_text())
    model, variables = load_pruned(workdir / "pruned")
    dataset = data.load(typed(config).data)
    images = data.normalize(dataset.test.images, dataset.preprocessing.mean, dataset.preprocessing.std)
    top1 = 100 * np.mean(np.argmax(model.apply(variables, images, train=False), -1) == dataset.test.labels)
    assert report["pruned_top1"] == pytest.approx(top1)
    assert report["test_images"] == 355
    assert report["notes"][0].startswith("The search has not converged: k and the open part of its gate differ by 0.0")
    assert report["delta_top1"] == pytest.approx(report["pruned_top1"] - report["base_top1"])
    assert 0.97 * P < report["flops_prunable_after"] / report["flops_prunable_before"] <= P
    kernels = [variables["params"][f"layer{stage}_0"]["conv1"]["kernel"] for stage in (1, 2, 3)]
    assert [kernel.shape[-1] for kernel in kernels] == report["widths"]
    assert report["verification"]["argmax_agreement"] == 1.0
    for name in (
        "config.json",
        "metrics.jsonl",
        "selection.json",
        "report.md",
        "report.html",
        "widths.png",
        "search.png",
    ):
        assert (workdir / name).stat().st_size > 0, name
    assert json.loads((workdir / "pruned" / "serving.json").read_text()) == dataset.serving()
    usual = "Pixels are multiplied by 0.003922 and normalized by the mean (0.3) and the standard deviation (0.35)."
    assert usual in (workdir / "report.md").read_text()


def test_a_run_that_is_stopped_in_every_stage_resumes_bit_for_bit(finished, config, tmp_path, monkeypatch):
    def stop(section, step, action, error, message=None):
        with monkeypatch.context() as patch, pytest.raises(error, match=message):
            interrupt_at(patch, section, step, action)
            pipeline.run(config, tmp_path)

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    saved = "stage 'search' is saved at step {}; the same command resumes it"
    stop("base", 3, kill, Killed)
    stop("search", 1, kill, Killed)
    stop("search", 1, terminate, preemption.Preempted, saved.format(2))  # where the state is evaluated, too
    assert (tmp_path / "search" / "2").is_dir()
    stop("search", 2, terminate, preemption.Preempted, saved.format(3))
    assert (tmp_path / "search" / "3").is_dir()
    stop("finetune", 4, kill, Killed)
    report = pipeline.run(config, tmp_path)
    assert_same_network(tmp_path, finished[0])
    assert report["pruned_top1"] == finished[1]["pruned_top1"]
    assert log_of(tmp_path) == log_of(finished[0])
    assert events_of(tmp_path) == events_of(finished[0])


def test_finished_stages_are_not_run_again(finished, config, monkeypatch):
    for section in ("base", "search", "finetune"):
        interrupt_at(monkeypatch, section, 0, kill)
    before = (finished[0] / "metrics.jsonl").read_text()
    assert pipeline.run(config, finished[0]) == finished[1]
    assert pipeline.run(typed(config), finished[0]) == finished[1]
    assert (finished[0] / "metrics.jsonl").read_text() == before


def test_a_report_names_the_devices_of_its_times(finished, config, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(parallel, "description", lambda: "1 x abacus")
    monkeypatch.setattr(timing, "in_turn", lambda calls: [30.0, 20.0])
    report = pipeline.run(config, workdir)
    assert (report["devices"], report["latency_devices"]) == ("8 x cpu", "1 x abacus")
    assert report["latency_ms"] == {"batch": 15, "before": 30.0, "after": 20.0, "runtime": "XLA"}
    written = (workdir / "report.md").read_text()
    assert "Latency: forward pass of a batch of 15 on 1 x abacus." in written and "On 8 x cpu." in written
    changed = ("latency_devices", "latency_ms", "other_latencies", "speedups")
    same = {name: value for name, value in finished[1].items() if name not in changed}
    assert same == {name: value for name, value in report.items() if name not in changed}


def test_events_have_the_log_and_come_back_where_they_are_lost(finished, config):
    before = events_of(finished[0])
    lines = [line for line in log_of(finished[0]) if line["stage"] == "finetune" and "loss" in line]
    assert before["finetune/loss"] == [(line["step"], np.float32(line["loss"])) for line in lines]
    shutil.rmtree(finished[0] / "tensorboard")
    pipeline.run(config, finished[0])
    assert events_of(finished[0]) == before


def test_another_configuration_is_refused(finished, config):
    config.search.tie_weight = 2.0
    with pytest.raises(ValueError, match=r"search\.tie_weight: workdir has 1\.0, this run has 2\.0"):
        pipeline.run(config, finished[0])


def test_nan_stops_and_keeps_the_last_good_checkpoint(config, tmp_path):
    config.base.update(learning_rate=1e38, warmup_epochs=0.0, save_every=1)
    with pytest.raises(FloatingPointError, match=r"stage 'base' is (nan at|no longer finite after) step 2"):
        pipeline.run(config, tmp_path)
    assert (tmp_path / "base" / "1").is_dir()


def test_own_model_is_pruned_through_rebuild(config, tmp_path):
    config.budget.p = 0.6
    config.search.method = "magnitude"
    report = pipeline.run(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    assert report["gate_names"] == ["first", "second"]
    assert (report["model"], report["precision"]) == ("Own", "float32")
    assert report["batch_norm"] == "synced"
    assert report["seconds"]["search"] == 0


class OwnNnx(nnx.Module):
    """A user's network in flax.nnx, with random numbers of its own."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 20, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(20, rngs=rngs)
        self.second = nnx.Conv(20, 12, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.classes = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.norm(self.first(x)))))
        return self.classes(self.dropout(x.mean((1, 2))))


def test_an_nnx_module_is_pruned_and_a_killed_run_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    config.search.method = "magnitude"
    config.finetune.control = True
    report = pipeline.run(config, tmp_path / "whole", model=OwnNnx(nnx.Rngs(3)))
    for stage in ("finetune", "control"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            interrupt_at(patch, stage, 2, kill)
            pipeline.run(config, tmp_path / "killed", model=OwnNnx(nnx.Rngs(3)))
    resumed = pipeline.run(config, tmp_path / "killed", model=OwnNnx(nnx.Rngs(3)))
    for key in ("widths", "pruned_top1", "control_top1"):
        assert resumed[key] == report[key]
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    models = [load_pruned(tmp_path / name / "pruned", OwnNnx(nnx.Rngs(4)))[0] for name in ("whole", "killed")]
    assert [models[0].first.out_features, models[0].second.out_features] == report["widths"]
    for part in ("first", "second", "classes"):
        ours, theirs = (getattr(model, part).kernel[...] for model in models)
        np.testing.assert_array_equal(ours, theirs)
    assert (report["model"], report["batch_norm"]) == ("OwnNnx", "synced")


def test_scores_of_images_are_searches_of_the_job(config, tmp_path):
    config.search.method = "taylor"
    config.search.allocation = "global"
    report = pipeline.run(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    assert report["flops_prunable_after"] <= P * report["flops_prunable_before"]
    assert report["seconds"]["search"] > 0
    assert report["notes"] == []  # it proposes no widths, which could miss the budget
    assert [line["step"] for line in log_of(tmp_path) if line["stage"] == "search" and "loss" in line] == [1, 2, 3, 4]


def test_budget_in_measured_latency_is_the_same_numbers_when_the_run_resumes(config, tmp_path):
    config.search.method = "magnitude"
    config.budget.update(kind="latency", p=1.0, latency_points=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "finetune", lambda *_: kill())
        patch.setattr(latency, "_milliseconds", lambda call, _: float(np.prod(call.x)) / 7 + call.kernel[-1] / 3)
        time_networks, time_fraction, measured = latency._networks, NetworkTimer.fraction, []

        def no_networks(*arguments):
            """Times the network as a run does, cut by `rebuild`, and leaves out what differs from time to time."""
            assert [each.widths for each in time_networks(*arguments)] == [(20, 12), (15, 9), (10, 6), (5, 3), (1, 1)]
            return ()

        def fraction(timer, widths):
            """Measured anew each time, as a run does; the first one counts."""
            measured.append(time_fraction(timer, widths))
            return measured[-1]

        patch.setattr(latency, "_networks", no_networks)
        patch.setattr(NetworkTimer, "fraction", fraction)
        with pytest.raises(Killed):
            pipeline.run(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    file = tmp_path / "latency.json"
    table = file.read_bytes()
    config.finetune.control = True  # asked for when the pruned network was there already
    report = pipeline.run(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    assert file.read_bytes() == table
    content = json.loads(table)
    whole = sum(layer["ms"][-1][-1] for layer in content["layers"])
    assert [layer["name"] for layer in content["layers"]] == ["first", "second", "classes"]
    assert report["budget"]["before"] == report["budget"]["predicted"] == pytest.approx(whole, rel=1e-12)
    assert report["budget"]["after"] == measured[0] * report["budget"]["before"]
    assert report["budget"]["kind"] == "latency"
    assert report["widths"] == [20, 12]
    assert report["budget"]["unit"] == f"ms (batch {config.eval_batch_size // jax.device_count()}, {cpu.description()})"
    assert "the latency table alone predicted p = 1.0000 for them." in (tmp_path / "report.md").read_text()
    # Nothing was cut, so the control, trained in the same way, is the same to the last bit
    tuned, control = ([line | {"stage": ""} for line in log_of(tmp_path) if line["stage"] == s] for s in TUNED)
    assert len(tuned) > 4 and tuned == control
    assert (report["control_top1"], report["delta_control_top1"]) == (report["pruned_top1"], 0)
    images = {stage: facts["images"] for stage, facts in report["training"].items()}
    assert images == {"base": 433, "finetune": 1298, "control": 1298}


def test_searches_from_several_seeds_go_on_and_leave_their_curves_in_the_log(config, tmp_path, monkeypatch):
    config.update_from_flattened_dict(default.SEARCHES["scalar"][1] | {"search.epochs": 2, "search.test_curve": True})
    seeds = (0, 4)

    def run(workdir):
        job = pipeline.prepare(config, workdir, model=Own((20, 12)), rebuild=Own)
        variables = job.network.model.init(jax.random.key(0), np.zeros((1, *job.dataset.image_shape)), train=False)
        pipeline.search_curves(job, variables, seeds)
        return log_of(workdir)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_at(patch, "search", 3, kill)
        run(tmp_path / "killed")
    assert run(tmp_path / "killed") == whole
    measured = whole[-1]
    for name in ("validation_top1", "validation_loss", "test_top1"):
        assert {f"seed{seed}/{name}" for seed in seeds} <= set(measured)
    assert measured["validation_top1"] == np.mean([measured[f"seed{seed}/validation_top1"] for seed in seeds])
    assert measured["seed0/validation_loss"] != measured["seed4/validation_loss"]
    seeds = (0, 1)
    with pytest.raises(ValueError, match=r"searches from seeds \[0, 4\], not \[0, 1\]"):
        run(tmp_path / "whole")


def test_killed_nppm_search_goes_on_bit_for_bit(data_dir, tmp_path, monkeypatch):
    config = tiny(data_dir, "nppm")
    config.search.update(epochs=2, memory_steps=1, predictor_batch_size=2)  # PN learns from the third step on

    def run(workdir):
        job = pipeline.prepare(config, workdir, model=Own((20, 12)), rebuild=Own)
        variables = job.network.model.init(jax.random.key(0), np.zeros((1, *job.dataset.image_shape)), train=False)
        method = stages._method(job, variables)
        assert method.notes == ()
        selection = pipeline.search(job, variables)
        with Checkpoints(workdir / "search") as checkpoints:
            _, state = checkpoints.restore(jax.device_get(method.init(jax.random.key(0))))
        return selection, log_of(workdir), state

    selection, log, state = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_at(patch, "search", 5, kill)
        run(tmp_path / "killed")
    selection_of_killed, log_of_killed, state_of_killed = run(tmp_path / "killed")
    assert (selection_of_killed, log_of_killed) == (selection, log)
    jax.tree.map(np.testing.assert_array_equal, state_of_killed, state)
    assert int(state.memory.count) == 8
    assert ["predictor_loss" in line for line in log if "loss" in line] == [False] * 2 + [True] * 6


def test_the_survey_of_the_authors_form_is_of_every_search_image_and_taken_once(data_dir, tmp_path, monkeypatch):
    config = tiny(data_dir, "authors")
    config.eval_batch_size = 64  # the last batch is filled up
    job = pipeline.prepare(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    variables = job.network.model.init(jax.random.key(0), np.zeros((1, *job.dataset.image_shape)), train=False)
    energy = stages._method(job, variables).init.__self__.energy

    pixels = job.dataset.train.images[job.dataset.splits["search"]]
    images = data.normalize(pixels, job.dataset.preprocessing.mean, job.dataset.preprocessing.std)
    assert len(images) % 64
    _, state = job.network.model.apply(variables, images, train=False, capture_intermediates=True)
    first = np.maximum(state["intermediates"]["first"]["__call__"][0], 0)  # what the second convolution reads
    means = np.mean(np.sum(np.square(first, dtype=np.float64), axis=(1, 2)), axis=0)
    np.testing.assert_allclose(energy[0], means / means.max(), rtol=1e-5)

    monkeypatch.setattr(stages, "image_sums", lambda *_: lambda *_: pytest.fail("taken again"))
    again = stages._method(pipeline.prepare(config, tmp_path, model=Own((20, 12)), rebuild=Own), variables)
    jax.tree.map(np.testing.assert_array_equal, again.init.__self__.energy, energy)


def test_a_latency_table_is_not_written_into_the_workdir_of_another_run(config, tmp_path):
    pipeline.prepare(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    config.budget.kind = "latency"
    with pytest.raises(ValueError, match=r"budget\.kind: workdir has 'flops', this run has 'latency'"):
        pipeline.prepare(config, tmp_path, model=Own((20, 12)), rebuild=Own)
    assert not (tmp_path / "latency.json").exists()


def test_budget_in_parameters(config, tmp_path):
    config.budget.update(kind="params", p=0.3)
    budget = pipeline.prepare(config, tmp_path, model=Own((20, 12)), rebuild=Own).budget
    assert budget.total == 9 * 20 + 20 + 40 + 9 * 20 * 12 + 12 + 12 * 10 + 10
    assert budget.cost((3, 2)) == 9 * 3 + 3 + 6 + 9 * 3 * 2 + 2 + 2 * 10 + 10


def refused(config, tmp_path, **fields):
    config.update_from_flattened_dict(fields)
    with pytest.raises((ValueError, OSError)) as error:
        pipeline.prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "seed=-1 must be at least 0."),
        ("base.epochs", 0, "base.epochs=0 must be at least 1."),
        ("search.epochs", 0, "search.epochs=0 must be at least 1."),
        ("search.chunk_steps", 0, "search.chunk_steps=0 must be at least 1."),
        ("finetune.save_every", 0, "finetune.save_every=0 must be at least 1."),
        ("finetune.recalibration_steps", -1, "finetune.recalibration_steps=-1 must be at least 0."),
        ("finetune.distillation_weight", 1.5, "finetune.distillation_weight=1.5 must be from 0.0 to 1.0."),
        ("finetune.distillation_temperature", 0.0, "finetune.distillation_temperature=0.0 must be at least 0.001."),
        ("base.label_smoothing", float("nan"), "base.label_smoothing=nan must be from 0.0 to 1.0."),
        (
            "finetune.warmup_epochs",
            5.0,
            "finetune.warmup_epochs=5.0 must be below the 1 epochs of the stage; give fewer.",
        ),
        ("base.schedule", "linear", "base.schedule='linear' is unknown; use one of 'constant', 'cosine', 'step'."),
    ],
)
def test_numbers_of_the_stages_are_refused_at_once(field, value, message, config, tmp_path):
    assert refused(config, tmp_path, **{field: value}) == message


def test_a_network_of_ones_own_is_named_in_the_configuration(config, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from tests.small_job import Own\n"
        "fixed = Own((6, 10))\n"
        "def made(num_classes): return Own((num_classes, 12))\n"
        "def plain(): return (lambda variables, images: images), {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config.model.attributes = {}
    for name, widths in (("fixed", (6, 10)), ("made", (10, 12))):
        config.model.name = f"mine:{name}"
        job = pipeline.prepare(config, tmp_path / name)
        assert (job.topology.widths, job.name) == (widths, "Own")
    assert refused(config, tmp_path, **{"model.name": "mine:plain"}) == (
        "model.name='mine:plain' must be a flax module, whose weights base.weights names, if any."
    )
    assert refused(config, tmp_path, **{"model.name": "mine:absent"}).startswith(
        "mine has no 'absent'; give MODULE:NAME"
    )


def test_a_forgotten_data_set_is_named_before_anything_is_downloaded(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset= is missing beside model=; give one of data\.from_folder or "):
        pipeline.run(Config(), tmp_path / "run", model=Own((6, 10)))
    assert not (tmp_path / "run").exists()


def test_the_configuration_of_ones_own_takes_a_folder_and_a_network(tmp_path, monkeypatch):
    for label in ("cat", "dog", "eel"):
        fill(tmp_path / "images", *(f"{label}/{i}.png" for i in range(60)), size=(20, 24))
    (tmp_path / "of_images.py").write_text(
        "import flax.linen as nn\n"
        "class Made(nn.Module):\n"
        "    num_classes: int = 2\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return nn.Dense(self.num_classes)(nn.Conv(6, (3, 3), name='first')(x).mean((1, 2)))\n"
        "two = Made()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = own.get_config("taylor,tiny")
    fields = {"model.name": "of_images:two", "data.data_dir": str(tmp_path / "images")}
    assert refused(config, tmp_path, **fields).startswith(
        "Made returns (1, 2) for one image, and images has 3 classes; "
    )
    config.model.name = "of_images:Made"
    job = pipeline.prepare(config, tmp_path / "run")
    assert (job.config.search.method, job.config.base.epochs, job.topology.input_shape) == ("taylor", 1, (20, 24, 3))
    assert (job.topology.widths, job.network.model.num_classes) == ((6,), 3)


def test_a_workdir_without_its_configuration_is_refused(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has metrics\.jsonl of a run but not its config\.json; restore it"):
        pipeline.prepare(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "metrics.jsonl",
            '{"stage": "search"}\n',
            "metrics.jsonl, line 1, has no stage and step; repair or delete the line.",
        ),
        ("results.json", "{}", "results.json is damaged: its checksum is wrong; restore a good copy, or delete it."),
        ("search", "", "search is a file where the run keeps a folder; move it away."),
        (
            "finetune/seconds.json",
            '{"seconds": 12.5, "checksum": "of another number"}',
            "finetune/seconds.json is damaged: its checksum is wrong; restore a good copy, or delete it.",
        ),
    ],
)
def test_what_no_stage_could_read_is_refused_before_the_first(name, content, sentence, config, tmp_path):
    pipeline.prepare(config, tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        pipeline.prepare(config, tmp_path)
    assert str(error.value) == f"{tmp_path}/{sentence}"


class Scaled(nn.Module):
    """A network that computes with its own number of channels."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(16, (3, 3), name="first")(x))
        return nn.Dense(10, name="classes")(x.mean((1, 2)) / x.shape[-1])


class WithWidths(Scaled):
    """The same, with an attribute that the library's own networks have."""

    widths: tuple = (16,)


UNCUT = r"does not compute what the masked one does.* It happens at the gates 'first': keep="


def test_an_own_model_that_cannot_be_cut_is_refused_before_it_is_trained(config, tmp_path):
    for model, rebuild, message in (
        (Scaled(), None, UNCUT),
        (WithWidths((16,)), None, UNCUT),
        (
            Own((20, 12)),
            lambda widths: Own((20, widths[1])),
            r"the smaller model expects batch_stats/norm/mean with shape \(20,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.prepare(config, tmp_path / "run", model=model, rebuild=rebuild)
    config.precision = "bfloat16"
    with pytest.raises(ValueError, match="precision='bfloat16' is for this library's models; give Own its own data"):
        pipeline.prepare(config, tmp_path / "run", model=Own((20, 12)), rebuild=Own)
    assert not (tmp_path / "run").exists()


class TwoHeads(nn.Module):
    """Has a second head that is computed in training mode alone, with a kernel that is no variable of the network."""

    returned: int = 2

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        logits = nn.Dense(10)(nn.relu(nn.Conv(8, (3, 3), name="second")(x)).mean((1, 2)))
        if not train:
            return logits
        second = x.mean((1, 2)) @ np.ones((8, 10), np.float32)
        return (logits, second) if self.returned == 2 else logits + second


def test_a_network_that_cannot_be_trained_is_refused_before_any_work(config, tmp_path):
    sentence = r"in training mode, TwoHeads returns \[0\] \(1, 10\), \[1\] \(1, 10\); select one of them with outputs="
    with pytest.raises(ValueError, match=sentence):
        pipeline.prepare(config, tmp_path / "run", model=TwoHeads())
    sentence = (
        "^TwoHeads can be pruned, but not trained afterwards: .* What it computes in training mode alone must not"
    )
    with pytest.raises(ValueError, match=sentence):
        pipeline.prepare(config, tmp_path / "run", model=TwoHeads(1))
    with pytest.raises(ValueError, match=sentence):
        first = lambda outputs: outputs[0] if isinstance(outputs, tuple) else outputs  # noqa: E731
        pipeline.prepare(config, tmp_path / "run", model=TwoHeads(), outputs=first)
    assert not (tmp_path / "run").exists()


class Twin(Own):
    """Another network with the same variables."""


def test_what_was_made_of_another_base_is_refused(config, tmp_path, monkeypatch):
    config.search.method = "magnitude"

    def run():
        return pipeline.run(config, tmp_path, model=Own((20, 12)), rebuild=Own)

    report = run()
    results = (tmp_path / "results.json").read_text()
    (tmp_path / "results.json").write_text(results.replace(f'"top1": {report["pruned_top1"]}', '"top1": 99.0'))
    with pytest.raises(ValueError, match=r"results\.json is damaged: its checksum is wrong; restore a good copy"):
        run()
    (tmp_path / "results.json").write_text(results)
    with pytest.raises(ValueError, match=r"given\.model\.class: workdir has '.*:Own', this run has '.*:Twin'"):
        pipeline.prepare(config, tmp_path, model=Twin((20, 12)), rebuild=Twin)

    initial = stages.initial_variables
    monkeypatch.setattr(
        stages, "initial_variables", lambda *args, **kw: jax.tree.map(lambda x: 0.9 * x, initial(*args, **kw))
    )
    shutil.rmtree(tmp_path / "base")  # and trained again to other weights
    with pytest.raises(ValueError, match=r"Checkpoint 6 in .*finetune was made from other weights, data or settings"):
        run()
    shutil.rmtree(tmp_path / "finetune")
    run()
    now, before = (json.loads(text) for text in ((tmp_path / "results.json").read_text(), results))
    assert all(now[name]["made_from"] != before[name]["made_from"] for name in ("base", "unfinetuned", "pruned"))


def test_initial_variables_are_those_of_the_module():
    model, images = models.create("resnet20", 10, widths=(4,) * 9), np.zeros((1, 32, 32, 3), np.float32)
    found = stages.initial_variables(as_network(model), images.shape[1:], seed=3)
    jax.tree.map(np.testing.assert_array_equal, found, model.init(jax.random.key(3), images))


def test_given_weights_are_known_by_their_content(config, tmp_path):
    model = Own((20, 12))
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), train=False)
    save_pruned(tmp_path / "base", model, variables)
    config.base.weights = str(tmp_path / "base")
    pipeline.prepare(config, tmp_path / "run", model=model, rebuild=Own)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    config.base.weights = str(tmp_path / "moved")
    pipeline.prepare(config, tmp_path / "run", model=model, rebuild=Own)
    save_pruned(tmp_path / "moved", model, jax.tree.map(lambda leaf: 2 * leaf, variables))
    with pytest.raises(ValueError, match=r"given\.weights: workdir has '[0-9a-f]{64}', this run has '[0-9a-f]{64}'"):
        pipeline.prepare(config, tmp_path / "run", model=model, rebuild=Own)


def test_cut_without_fine_tuning(config, tmp_path):
    model = Own((20, 12))
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), train=False)
    save_pruned(tmp_path / "base", model, variables)
    config.base.weights = str(tmp_path / "base")
    config.search.method = "magnitude"
    config.finetune.epochs = 0
    report = pipeline.run(config, tmp_path / "run", model=model, rebuild=Own)
    assert report["pruned_top1"] == report["unfinetuned_top1"]
    assert report["best_pruned_validation_top1"] is None
    assert (
        "| fine-tuning   |      - |      - |     - |             - | not run |"
        in (tmp_path / "run" / "report.md").read_text()
    )
    assert load_pruned(tmp_path / "run" / "pruned")[0] == Own(tuple(report["widths"]))


def test_refusals_name_the_field(config, tmp_path):
    assert "model 'resnet57' is unknown" in refused(config, tmp_path, **{"model.name": "resnet57"})


def test_p_must_be_a_fraction(config, tmp_path):
    assert "budget.p=1.5 must be in (0, 1]" in refused(config, tmp_path, **{"budget.p": 1.5})


def test_impossible_budget_prints_what_is_possible(config, tmp_path):
    message = refused(config, tmp_path, **{"budget.p": 0.01})
    assert "budget.p=0.01 cannot be met" in message
    assert "parameters" in message


def test_unknown_data(config, tmp_path):
    assert "data.name='cifar11' is unknown" in refused(config, tmp_path, **{"data.name": "cifar11"})


def test_held_out_images_are_enough(config, tmp_path):
    few = refused(config, tmp_path, **{"data.search_fraction": 0.1})
    assert few == (
        "search_fraction and validation_fraction leave 144 of the 1442 training images of digits to search, fewer than "
        "search.batch_size=256; change them, or take smaller batches."
    )
    fewer = refused(config, tmp_path, **{"data.search_fraction": 0.9, "data.validation_fraction": 0.05})
    assert "leave 72 of the 1442 training images of digits to base, fewer than base.batch_size=128" in fewer
    none = refused(config, tmp_path, **{"data.search_fraction": 0.6, "data.validation_fraction": 0.0})
    assert "validation_fraction holds out none of the 1442 training images of digits to choose the best" in none


def test_missing_data_folder(tmp_path):
    config = cifar10_r56.get_config()
    assert "data.data_dir" in refused(config, tmp_path, **{"data.data_dir": str(tmp_path / "nowhere")})


def test_batch_that_the_devices_cannot_share(config, tmp_path):
    assert refused(config, tmp_path, **{"search.images": 100}) == (
        "search.images=100 are fewer than search.batch_size=256; change one of the two."
    )
    assert "search.batch_size=250" in refused(config, tmp_path, **{"search.batch_size": 250})


def test_batch_that_has_no_equal_parts(config, tmp_path):
    message = refused(config, tmp_path, **{"base.micro_batches": 3})
    assert message == "base.batch_size=128 has no base.micro_batches=3 equal parts."
    message = refused(config, tmp_path, **{"base.micro_batches": 32})
    assert message.startswith("base.batch_size / base.micro_batches=4 cannot be shared equally by 8 devices")


def test_unusable_weights_leave_the_workdir_to_the_corrected_command(config, tmp_path):
    config.base.weights = str(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"none\.pth' does not exist"):
        pipeline.prepare(config, tmp_path / "run")
    config.base.weights = str(tmp_path / "other.pth")
    torch.save({"conv1.weight": torch.zeros(8, 1, 3, 3)}, config.base.weights)
    with pytest.raises(ValueError, match=r"other\.pth .*'conv1\.weight' has shape \(8, 1, 3, 3\)"):
        pipeline.prepare(config, tmp_path / "run")
    config.base.weights = str(tmp_path / "folder")
    other = Own((20, 13))
    save_pruned(config.base.weights, other, other.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), train=False))
    with pytest.raises(
        ValueError, match=r"model\.json holds a network with channels=\[20, 13\], and the model has its"
    ):
        pipeline.prepare(config, tmp_path / "run")
    config.base.weights = ""
    assert pipeline.prepare(config, tmp_path / "run").weights is None


@pytest.mark.parametrize(
    "name",
    [
        *("cifar10_mbv2", "cifar10_r56", "imagenet_efficientnet_lite0"),
        *("imagenet_mbv2", "imagenet_r50", "imagenet_shufflenet"),
    ],
)
def test_tiny_forms_fill_the_batches_of_every_stage(name):
    config = importlib.import_module(f"configs.{name}").get_config("nppm,tiny")
    count = int(re.fullmatch(r"train\[:(\d+)\]", config.data.train_split)[1])
    splits = data.split(count, 0, config.data.search_fraction, config.data.validation_fraction)
    assert len(splits["search"]) >= config.search.batch_size
    assert len(splits["train"]) >= config.base.batch_size
    assert len(splits["validation"]) > 0
    for section in (config.base, config.search, config.finetune):
        assert section.epochs == 1
    assert data.label(typed(config).data).endswith(f", train[:{count}]")


def test_configurations_are_locked_and_name_their_variants():
    with pytest.raises(AttributeError):
        cifar10_r56.get_config().search.temprature = 1.0
    with pytest.raises(ValueError, match=r"argument 'nppn' is unknown; use ddnp, authors"):
        cifar10_r56.get_config("nppn")


@pytest.mark.parametrize(
    ("module", "argument", "rate"),
    [
        (digits_r20, "", 3e-3),
        (digits_r20, "authors", 1e-3),
        (digits_r20, "scalar", 5e-2),
        (cifar10_r56, "", 1e-3),
        (cifar10_r56, "authors", 1e-3),
    ],
)
def test_a_short_search_has_a_faster_rate_of_widths(module, argument, rate):
    assert module.get_config(argument).search.width_optimizer.learning_rate == rate


@pytest.mark.parametrize(
    ("module", "argument", "fraction", "images"),
    [
        (digits_r20, "", 0.3, 0),
        (digits_r20, "nppm", 0.3, 0),
        (cifar10_r56, "", 0.05, 0),
        (cifar10_r56, "dg", 0.1, 0),
        (cifar10_r56, "chip", 0.05, 0),
        (imagenet_r50, "", 0.025, 0),
        (imagenet_r50, "nppm", 0.1, 0),
        (imagenet_r50, "chip", 0.025, 640),
    ],
)
def test_every_method_searches_on_its_images(module, argument, fraction, images):
    config = module.get_config(argument)
    assert (config.data.search_fraction, config.search.images) == (fraction, images)


def test_some_of_the_search_images_can_be_used(config, tmp_path):
    every = pipeline.prepare(config, tmp_path / "every").stage_images("search")
    config.search.images = 300
    job = pipeline.prepare(config, tmp_path / "some")
    used = job.stage_images("search")
    assert len(used) == 300 and set(used) < set(every) and np.all(np.diff(used) > 0)
    assert used[-1] > every[-20]  # from everywhere: a folder holds class after class
    assert set(every) < set(job.stage_images("finetune"))
    config.search.images = len(every) + 1
    np.testing.assert_array_equal(pipeline.prepare(config, tmp_path / "more").stage_images("search"), every)


def test_cpu_devices_share_every_batch(config, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    config.update({"eval_batch_size": 96, "base": {"batch_size": 36}, "finetune": {"batch_size": 72}})
    config.search.batch_size = 48
    assert launch.cpu_devices(config) == 12
    config.search.batch_size = 128
    assert launch.cpu_devices(config) == 4
    assert launch.cpu_devices(config, processes=2) == 2
