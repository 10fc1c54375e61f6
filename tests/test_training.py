import functools
import json
import os
import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from ddnp_jax import data, parallel, preemption, training
from ddnp_jax.checkpoint import Checkpoints
from ddnp_jax.config import TrainerConfig
from ddnp_jax.networks import as_network
from ddnp_jax.pipeline import stages
from ddnp_jax.training import evaluation, log, loop

PIXELS = ConfigDict({"mean": (0.5, 0.25, 0.4), "std": (0.2, 0.5, 0.25), "bgr": False, "pad": 1, "flip": True})
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
LABELS = np.int32(RNG.integers(0, 10, 40))
DATA = data.InMemory(IMAGES, LABELS, PIXELS)


def make_config(**fields):
    return TrainerConfig(**{"epochs": 8, "weight_decay": 1e-2} | fields)


# Schedules: step -> learning rate

SCHEDULES = [
    ({}, {0: 0.1, 39: 0.1, 40: 0.01, 59: 0.01, 60: 0.001, 79: 0.001}),
    ({"warmup_epochs": 1.0}, {0: 0.0, 1: 0.01, 9: 0.09, 10: 0.1, 39: 0.1, 40: 0.01, 59: 0.01, 60: 0.001}),
    ({"warmup_epochs": 0.5, "learning_rate": 0.2}, {0: 0.0, 1: 0.04, 4: 0.16, 5: 0.2, 39: 0.2, 40: 0.02}),
    ({"decay_at": (0.8,)}, {63: 0.1, 64: 0.01, 79: 0.01}),
    ({"schedule": "cosine"}, {0: 0.1, 20: 0.0853553, 40: 0.05, 60: 0.0146447, 80: 0.0}),
    (
        {"schedule": "cosine", "warmup_epochs": 1.0, "epochs": 9},
        {0: 0.0, 5: 0.05, 10: 0.1, 30: 0.0853553, 50: 0.05, 70: 0.0146447, 90: 0.0},
    ),
    # The papers': 200 epochs of 391 steps, five of them warm-up
    (
        {"epochs": 200, "warmup_epochs": 5.0, "steps_per_epoch": 391},
        {391: 0.02, 1954: 0.1 * 1954 / 1955, 1955: 0.1, 39099: 0.1, 39100: 0.01, 58649: 0.01, 58650: 0.001},
    ),
]


@pytest.mark.parametrize(("fields", "rates"), SCHEDULES, ids=str)
def test_schedule_literal(fields, rates):
    fields = dict(fields)
    steps_per_epoch = fields.pop("steps_per_epoch", 10)
    schedule = stages.schedule(make_config(**fields), steps_per_epoch)
    found = [float(schedule(jnp.int32(step))) for step in rates]
    np.testing.assert_allclose(found, list(rates.values()), rtol=1e-5, atol=1e-8)


def test_a_constant_schedule_stays_after_its_warm_up():
    rate = training.schedule("constant", 0.2, steps=20, warmup_steps=4)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 3, 4, 19, 40)], [0, 0.05, 0.15, 0.2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 50}, r"^warmup_steps=50 must be below the 50 steps\.$"),
        ({"decay_at": (50, 75)}, r"^decay_at=\(50, 75\) must be fractions of the run, in \(0, 1\]\.$"),
        ({"kind": "linear"}, r"^schedule='linear' is unknown; use one of 'constant', 'cosine', 'step'\.$"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        training.schedule(**{"kind": "step", "learning_rate": 0.1, "steps": 50, **arguments})


# One step against PyTorch


class Net(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, dtype=self.dtype, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="bn")(x)
        return nn.Dense(10, dtype=self.dtype, name="head")(nn.relu(x).mean((1, 2)))


class WithoutBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


def random_variables(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    return jax.tree.map(lambda x: np.float32(rng.uniform(0.1, 0.6, x.shape)), shapes)


def torch_net(variables):
    """The same network in PyTorch, float32."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 10),
    )
    params, stats = variables["params"], variables["batch_stats"]["bn"]
    state = {
        "0.weight": params["conv"]["kernel"].transpose(3, 2, 0, 1),
        "1.weight": params["bn"]["scale"],
        "1.bias": params["bn"]["bias"],
        "1.running_mean": stats["mean"],
        "1.running_var": stats["var"],
        "1.num_batches_tracked": np.int64(0),
        "5.weight": params["head"]["kernel"].T,
        "5.bias": params["head"]["bias"],
    }
    net.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()})
    return net


@functools.cache
def on_devices(step, devices=1):
    """A step over some devices."""
    step = functools.partial(step, devices=parallel.OVER_DEVICES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    specs = {"in_specs": (P(), P(), P("data"), P()), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))


def batch(i, size=16):
    index = slice(i * size, (i + 1) * size)
    return np.float32(IMAGES[index] / 255 - 0.5), LABELS[index]


@pytest.mark.parametrize("distilled", [False, True])
def test_training_steps_match_pytorch(distilled):
    # Four steps, and the rate falls to a tenth after two of them and again after three.
    network = as_network(Net())
    variables, teacher_variables = random_variables(Net()), random_variables(Net(), seed=1)
    optimizer = stages.optimizer(make_config(epochs=4), steps_per_epoch=1)
    distillation = training.Distillation(network, 0.3, 4.0) if distilled else None
    step = on_devices(training.train_step(network, optimizer, label_smoothing=0.1, distillation=distillation))
    state = training.init_state(network, variables, optimizer)

    net, teacher = torch_net(variables), torch_net(teacher_variables).eval()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for i, rate in enumerate((0.1, 0.1, 0.01, 0.001)):
        images, labels = batch(i % 2)
        state, metrics = step(state, teacher_variables, (images, labels), jax.random.key(0))

        x = torch.tensor(images).permute(0, 3, 1, 2)
        mean_before = net[1].running_mean.clone()
        logits = net(x)
        loss = functional.cross_entropy(logits, torch.tensor(labels).long(), label_smoothing=0.1)
        if distilled:
            student, soft = functional.log_softmax(logits / 4, -1), functional.softmax(teacher(x) / 4, -1)
            loss = 0.7 * loss + 0.3 * 16 * functional.kl_div(student, soft, reduction="batchmean")
        sgd.param_groups[0]["lr"] = rate
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["top1"], 100 * np.mean(logits.argmax(1).numpy() == labels), rtol=1e-6)
        assert torch.any(net[1].running_mean != mean_before)

    assert state.step == 4
    params = state.parameters
    for found, wanted in (
        (params["conv"]["kernel"], net[0].weight.permute(2, 3, 1, 0)),
        (params["bn"]["scale"], net[1].weight),
        (params["bn"]["bias"], net[1].bias),
        (params["head"]["kernel"], net[5].weight.T),
        (params["head"]["bias"], net[5].bias),
    ):
        np.testing.assert_allclose(found, wanted.detach(), atol=1e-5)
    np.testing.assert_allclose(state.rest["batch_stats"]["bn"]["mean"], net[1].running_mean, atol=1e-5)
    # Flax averages the biased variance, PyTorch the unbiased one: n / (n - 1) for n = 16 * 4 * 4 values.
    kept = 0.9**4 * variables["batch_stats"]["bn"]["var"]
    unbiased = kept + (state.rest["batch_stats"]["bn"]["var"] - kept) * 256 / 255
    np.testing.assert_allclose(unbiased, net[1].running_var, atol=1e-5)


def test_eight_devices_train_on_the_mean_gradient_of_the_batch():
    network, optimizer = as_network(WithoutBatchNorm()), stages.optimizer(make_config(), steps_per_epoch=1)
    step = training.train_step(network, optimizer)
    state = training.init_state(network, random_variables(network.model), optimizer)
    one, eight = (on_devices(step, n)(state, None, batch(0), jax.random.key(0)) for n in (1, 8))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_updates_of_micro_batches_are_those_of_whole_batches():
    network, variables = as_network(WithoutBatchNorm()), random_variables(WithoutBatchNorm())
    params = {}
    for parts in (1, 4):
        # Two updates, one per epoch, the second at a tenth of the rate.
        config = make_config(epochs=2, decay_at=(0.5,), micro_batches=parts)
        optimizer = stages.optimizer(config, steps_per_epoch=parts)
        step = on_devices(training.train_step(network, optimizer))
        state = training.init_state(network, variables, optimizer)
        trace = [state.parameters]
        for i in range(2 * parts):
            state, _ = step(state, None, batch(i, size=16 // parts), jax.random.key(0))
            trace.append(state.parameters)
        params[parts] = trace
    for i, j in ((1, 4), (2, 8)):
        for a, b in zip(jax.tree.leaves(params[1][i]), jax.tree.leaves(params[4][j]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for i in (1, 2, 3, 5, 6, 7):  # nothing moves between the updates
        jax.tree.map(np.testing.assert_array_equal, params[4][i], params[4][i - 1])


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10, name="dense")(x)


def test_dropout_draws_by_step_and_device():
    network, optimizer = as_network(Dropping()), stages.optimizer(make_config(), steps_per_epoch=1)
    state = training.init_state(network, random_variables(network.model), optimizer)
    images, labels = batch(0)
    losses = {}
    for key in (0, 1):
        dropped = [
            network.train({"params": state.parameters}, images[part], jax.random.fold_in(jax.random.key(key), device))[
                0
            ]
            for device, part in enumerate(np.split(np.arange(len(images)), 2))
        ]
        wanted = functional.cross_entropy(torch.tensor(np.concatenate(dropped)), torch.tensor(labels).long())
        step = on_devices(training.train_step(network, optimizer), 2)
        losses[key] = float(step(state, None, (images, labels), jax.random.key(key))[1]["loss"])
        assert losses[key] == pytest.approx(wanted.item(), rel=1e-5)
    assert losses[0] != losses[1]


def test_recalibration_changes_batch_statistics_alone():
    network, optimizer = as_network(Net()), stages.optimizer(make_config(), steps_per_epoch=1)
    before = training.init_state(network, random_variables(Net()), optimizer)
    after, _ = on_devices(training.recalibration_step(network))(before, None, batch(0), jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal, (after.parameters, after.opt_state), (before.parameters, before.opt_state)
    )
    kernel = torch.tensor(before.parameters["conv"]["kernel"]).permute(3, 2, 0, 1)
    x = functional.conv2d(torch.tensor(batch(0)[0]).permute(0, 3, 1, 2), kernel, padding=1).numpy()
    old, new = before.rest["batch_stats"]["bn"], after.rest["batch_stats"]["bn"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * x.var((0, 2, 3)), atol=1e-5)


# Chunks of steps


def recording_step(state, constants, batch, rng, devices=parallel.ONE_DEVICE):
    """Changes the state depending on the step's inputs, and returns these inputs as metrics."""
    images, labels = batch
    seen = devices.mean(jnp.mean(images, (0, 1, 2)))
    draw = jax.random.uniform(rng)
    w = 0.9 * state.parameters + constants * jnp.sum(seen) + draw
    metrics = {"loss": w, "draw": draw, "red": seen[0], "label": devices.mean(jnp.mean(1.0 * labels))}
    metrics["late"] = jnp.where(state.step < 4, jnp.nan, 1.0 * state.step)  # not there in the first four steps
    return state.replace(step=state.step + 1, parameters=w), metrics


def recording_state():
    return training.TrainState(np.int32(0), np.float32(1), {}, ())


def recording_chunk(seed=5, augment=False, step=recording_step):
    return parallel.data_parallel(training.chunk_of(step, DATA, seed, augment))


def run_constants():
    return {"images": DATA.on_devices, "step": parallel.replicate(np.float32(0.1))}


def indices(steps):
    """The indices that a run on 40 images in batches of 16 draws in these steps."""
    batches = data.batches(np.arange(40), 16, seed=0)
    return np.stack([batches[step].image for step in steps])


def in_chunks(lengths, **options):
    chunk, state, constants = recording_chunk(**options), parallel.replicate(recording_state()), run_constants()
    metrics, step = [], 0
    for length in lengths:
        state, measured = chunk(state, constants, parallel.shard_batches(indices(range(step, step + length))))
        metrics.append(parallel.fetch(measured))
        step += length
    return parallel.fetch(state), jax.tree.map(lambda *parts: np.concatenate(parts), *metrics)


def test_chunks_of_any_length_take_the_same_steps():
    state, metrics = in_chunks([1] * 6)
    for lengths in ([6], [2, 4]):
        other_state, other_metrics = in_chunks(lengths)
        assert other_state.step == state.step == 6
        for name in metrics:
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-6)
    assert len(set(metrics["draw"])) == 6
    assert not set(metrics["draw"]) & set(in_chunks([6], seed=6)[1]["draw"])
    reds = [np.mean((IMAGES[index][..., 0] / 255 - 0.5) / 0.2) for index in indices(range(6))]
    np.testing.assert_allclose(metrics["red"], reds, atol=1e-5)
    np.testing.assert_allclose(metrics["label"], [np.mean(LABELS[i]) for i in indices(range(6))], rtol=1e-6)


def test_augmentation_happens_only_when_asked_for():
    plain, augmented = in_chunks([6])[1], in_chunks([6], augment=True)[1]
    assert np.all(plain["red"] != augmented["red"])
    np.testing.assert_array_equal(plain["draw"], augmented["draw"])


# Evaluation


@pytest.mark.parametrize("batch_size", [8, 16, 40, 64])
@pytest.mark.parametrize("count", [40, 37])
def test_evaluation_counts_every_image_once(batch_size, count):
    weights = np.float32(np.random.default_rng(3).normal(size=(48, 10)))

    def forward(variables, images):
        return images.reshape(images.shape[0], -1) @ variables["w"]

    chosen = np.random.default_rng(1).choice(40, count, replace=False)
    evaluate = evaluation.evaluator(forward, DATA, batch_size, "shard_map")
    found = evaluate({"w": weights}, chosen)

    images, labels = IMAGES[chosen], LABELS[chosen]
    x = (images / 255 - np.array(PIXELS.mean)) / np.array(PIXELS.std)
    logits = x.reshape(count, -1) @ np.float64(weights)
    own = logits[np.arange(count), labels]
    rank = np.sum(logits > own[:, None], axis=1)
    loss = np.mean(np.log(np.sum(np.exp(logits - own[:, None]), axis=1)))
    assert 0 < np.mean(rank < 1) < np.mean(rank < 5) < 1
    np.testing.assert_allclose(found["top1"], 100 * np.mean(rank < 1), rtol=1e-6)
    np.testing.assert_allclose(found["top5"], 100 * np.mean(rank < 5), rtol=1e-6)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)


def test_top5_of_fewer_than_five_classes_is_everything():
    images = data.InMemory(IMAGES, np.zeros(40, np.int32), PIXELS)
    evaluate = evaluation.evaluator(lambda variables, images: images.mean((1, 2)), images, 8, "shard_map")
    assert evaluate({}, np.arange(10))["top5"] == 100.0


# The loop of a stage


def run_stage(folder, chunk=None, evaluate=None, made_from=""):
    """Ten steps in chunks of three, with a checkpoint every second chunk."""
    stage = loop.Stage("search", folder / "search", 10, 3, 16, chunk_steps=3, save_every=2, made_from=made_from)
    guard = preemption.PreemptionGuard()
    with guard:
        return _fitted(stage, folder, chunk, evaluate, guard)


def _fitted(stage, folder, chunk, evaluate, guard):
    batches = data.batches(np.arange(40), 16, seed=0)
    return loop.fit_stage(
        stage,
        chunk or recording_chunk(),
        recording_state(),
        run_constants(),
        lambda step: data.read_ahead(batches[step:10], lambda draws: DATA.read(draws, None), 0, 3),
        evaluate or (lambda state: {"validation_top1": float(state.step)}),
        log.MetricsLog(folder / "metrics.jsonl"),
        guard,
    )


def log_lines(folder):
    """The log without its first line and the speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "crc")} for line in lines]


def events_of(folder):
    """The values that TensorBoard shows for a run: (step, value) by tag, without the speed."""
    shown = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = (tag for tag in shown.Tags()["scalars"] if not tag.endswith("/images_per_s"))
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in tags}


def interrupted(at, action):
    """A chunk that does something before step `at`, once."""
    chunk, pending = recording_chunk(), [action]

    def call(state, constants, indices):
        if int(state.step) == at and pending:
            pending.pop()()
        return chunk(state, constants, indices)

    return call


def fail():
    raise RuntimeError("the power went out")


def test_a_stage_logs_its_steps_and_evaluations(tmp_path):
    state = run_stage(tmp_path)
    wanted, metrics = in_chunks([1] * 10)
    assert (state.step, state.parameters) == (10, wanted.parameters)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 6, 9, 10, 10]
    assert [line.get("validation_top1") for line in lines] == [None, None, 6.0, None, None, 10.0]
    steps = [line for line in lines if "loss" in line]
    for line, part in zip(steps, np.split(metrics["loss"], [3, 6, 9]), strict=True):
        assert line["stage"] == "search"
        assert line["epoch"] == pytest.approx(line["step"] / 3)
        assert line["loss"] == pytest.approx(np.mean(part), rel=1e-6)
    assert [line.get("late") for line in steps] == [None, 4.5, 7.0, 9.0]


@pytest.mark.parametrize("at", [1, 4, 7, 9])
def test_a_stage_that_died_goes_on_to_the_same_end(at, tmp_path):
    whole = run_stage(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power went out"):
        run_stage(tmp_path / "cut", interrupted(at, fail))
    resumed = run_stage(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")
    assert events_of(tmp_path / "cut") == events_of(tmp_path / "whole")


def test_sigterm_saves_and_the_stage_goes_on_to_the_same_end(tmp_path):
    whole = run_stage(tmp_path / "whole")
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(preemption.Preempted, match="stage 'search' is saved at step 3"):
        run_stage(tmp_path / "cut", interrupted(1, terminate))
    first = []
    chunk = recording_chunk()

    def watched(state, constants, indices):
        first.append(int(state.step))
        return chunk(state, constants, indices)

    resumed = run_stage(tmp_path / "cut", watched)
    assert first[0] == 3
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


def test_a_finished_stage_is_not_run_again(tmp_path):
    first = run_stage(tmp_path)
    again = run_stage(tmp_path, chunk=lambda *_: fail(), evaluate=lambda _: fail())
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert loop.seconds(tmp_path / "search") > 0


def test_seconds_of_another_run_are_refused(tmp_path):
    run_stage(tmp_path / "a", made_from="a")
    run_stage(tmp_path / "b", made_from="b")
    shutil.copy(tmp_path / "b/search/seconds.json", tmp_path / "a/search")
    with pytest.raises(ValueError, match=r"a/search/seconds\.json was made from other weights, data or settings"):
        run_stage(tmp_path / "a", made_from="a")


def nan_loss(*arguments):
    state, metrics = recording_step(*arguments)
    return state, metrics | {"loss": jnp.where(state.step == 8, jnp.nan, metrics["loss"])}


def nan_parameters(*arguments):
    """A step with a finite loss and a gradient that is not; only the next loss, after a checkpoint, would show it."""
    state, metrics = recording_step(*arguments)
    return state.replace(parameters=jnp.where(state.step == 6, jnp.nan, state.parameters)), metrics


def test_a_nan_loss_stops_the_stage_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^the loss of stage 'search' is nan at step 8; .*checkpoint is kept"):
        run_stage(tmp_path, recording_chunk(step=nan_loss))
    with Checkpoints(tmp_path / "search") as checkpoints:
        step, state = checkpoints.restore(recording_state())
    assert step == 6
    assert state.parameters == in_chunks([1] * 6)[0].parameters


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^the state of stage 'search' is no longer finite after step 6; "):
        run_stage(tmp_path, recording_chunk(step=nan_parameters))
    with Checkpoints(tmp_path / "search") as checkpoints:
        assert checkpoints.restore(recording_state()) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_stage_and_step(value):
    loop.check_finite("base", 20, {"loss": np.ones(4)})
    with pytest.raises(FloatingPointError, match=rf"^the loss of stage 'base' is {value} at step 23; "):
        loop.check_finite("base", 20, {"loss": np.array([1.0, 2.0, value, value])})


def test_tensorboard_shows_what_the_log_has(tmp_path):
    run_stage(tmp_path)
    wanted = {}
    for line in log_lines(tmp_path):
        for name, value in line.items():
            if name not in ("stage", "step"):
                wanted.setdefault(f"search/{name}", []).append((line["step"], np.float32(value)))
    assert wanted["search/late"][0][0] == 6 and events_of(tmp_path) == wanted


def test_events_of_all_numbers_are_there_at_once_and_rewinding_drops_those_of_the_stage_alone(tmp_path):
    lines = log.MetricsLog(tmp_path / "metrics.jsonl", "one")
    for step in (1, 200, 70_000):
        lines.write("base", step, loss=1 / step, top1=100)
        lines.write("search", step, loss=1e39, gap=-0.1)
        assert events_of(tmp_path)["search/gap"][-1] == (step, np.float32(-0.1))  # nothing waits in a queue
    lines.rewind("search", 1)
    lines.write("search", 3, gap=2.0)
    assert events_of(tmp_path) == {
        "base/loss": [(step, np.float32(1 / step)) for step in (1, 200, 70_000)],
        "base/top1": [(1, 100), (200, 100), (70_000, 100)],
        "search/loss": [(1, np.inf)],
        "search/gap": [(1, np.float32(-0.1)), (3, 2)],
    }
    assert len([*(tmp_path / "tensorboard").iterdir()]) == 2


def test_a_tensorboard_that_is_open_drops_what_was_rewound(tmp_path):
    lines = log.MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.write("search", step, loss=step)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for value in (20, 30, 40):
        lines.rewind("search", 1)
        lines.write("search", 2, loss=value)
        assert [(event.step, event.value) for event in shown.Reload().Scalars("search/loss")] == [(1, 1), (2, value)]
    assert [path.stat().st_size > 0 for path in sorted((tmp_path / "tensorboard").iterdir())] == [False, True]


def test_the_log_goes_on_whatever_becomes_of_the_events(tmp_path, caplog):
    lines = log.MetricsLog(tmp_path / "metrics.jsonl")
    lines.write("search", 1, loss=1.0)
    shutil.rmtree(tmp_path / "tensorboard")
    lines.write("search", 2, loss=2.0)
    assert events_of(tmp_path) == {"search/loss": [(1, 1), (2, 2)]}
    shutil.rmtree(tmp_path / "tensorboard")
    log.MetricsLog(tmp_path / "metrics.jsonl").restore_events()
    assert events_of(tmp_path) == {"search/loss": [(1, 1), (2, 2)]}
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    lines.write("search", 3, loss=3.0)
    lines.write("search", 4, loss=4.0)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]
    warning = f"{tmp_path}/tensorboard cannot be written (File exists): TensorBoard will not see this run."
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_rewinding_the_log_drops_later_lines_of_the_stage_alone(tmp_path):
    lines = log.MetricsLog(tmp_path / "metrics.jsonl")
    lines.rewind("search", 0)  # nothing there yet
    for stage, step in (("base", 50), ("search", 3), ("search", 6)):
        lines.write(stage, step, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "search", "st')  # a write that was cut
    lines.rewind("search", 3)
    assert log_lines(tmp_path) == [
        {"stage": "base", "step": 50, "loss": 1.0},
        {"stage": "search", "step": 3, "loss": 1.0},
    ]
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole.replace(b'"step": 50', b'"step": '))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON .*; repair or delete the line\.$"):
        lines.rewind("search", 3)
