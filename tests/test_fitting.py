"""Training and searching without the job: `fit` with every kind of network, and `run_search`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from test_ddnp import IMAGES, LABELS, VARIABLES, Tiny, make_problem, topology
from test_training import Net, batch, random_variables, torch_net
from torch.nn import functional

from ddnp_jax import methods
from ddnp_jax.cost.budget import Budget
from ddnp_jax.methods.ddnp import search as ddnp
from ddnp_jax.methods.nppm import search as nppm
from ddnp_jax.training import fitting
from ddnp_jax.training.fitting import evaluate, fit

BATCHES = [batch(0), batch(1)]


# fit against PyTorch


@pytest.mark.parametrize("taught", [False, True])
def test_fit_is_sgd_of_pytorch(taught):
    variables, teacher_variables = random_variables(Net()), random_variables(Net(), seed=1)
    fitted = fit(
        Net(),
        variables,
        BATCHES,
        steps=4,
        learning_rate=0.1,
        weight_decay=1e-2,
        schedule="cosine",
        label_smoothing=0.1,
        teacher=(Net(), teacher_variables) if taught else None,
        distillation_weight=0.3,
        progress=False,
    )
    net, teacher = torch_net(variables), torch_net(teacher_variables).eval()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(4):
        images, labels = BATCHES[step % 2]
        logits = net(torch.tensor(images).permute(0, 3, 1, 2))
        loss = functional.cross_entropy(logits, torch.tensor(labels).long(), label_smoothing=0.1)
        if taught:
            soft = functional.softmax(teacher(torch.tensor(images).permute(0, 3, 1, 2)) / 4, -1)
            divergence = functional.kl_div(functional.log_softmax(logits / 4, -1), soft, reduction="batchmean")
            loss = 0.7 * loss + 0.3 * 16 * divergence
        sgd.param_groups[0]["lr"] = 0.1 * (1 + np.cos(np.pi * step / 4)) / 2
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        assert fitted.history["loss"][step] == pytest.approx(loss.item(), rel=1e-5)
        top1 = 100 * np.mean(logits.argmax(1).numpy() == labels)
        assert fitted.history["top1"][step] == pytest.approx(top1, rel=1e-6)
    assert fitted.history["loss"].shape == (4,)
    params = fitted.variables["params"]
    np.testing.assert_allclose(params["conv"]["kernel"], net[0].weight.detach().permute(2, 3, 1, 0), atol=1e-5)
    np.testing.assert_allclose(params["head"]["kernel"], net[5].weight.detach().T, atol=1e-5)
    np.testing.assert_allclose(fitted.variables["batch_stats"]["bn"]["mean"], net[1].running_mean, atol=1e-5)
    assert isinstance(fitted.model, Net)
    jax.tree.map(np.testing.assert_array_equal, variables, random_variables(Net()))  # as they were


def test_evaluation_is_the_mean_of_pytorch_over_all_images():
    variables = random_variables(Net())
    images, labels = map(np.concatenate, zip(*BATCHES, strict=True))
    found = evaluate(Net(), variables, [(images[:25], labels[:25]), (images[25:], labels[25:])])  # 25 and 7
    logits = torch_net(variables).eval()(torch.tensor(images).permute(0, 3, 1, 2))
    assert found == {
        "loss": pytest.approx(functional.cross_entropy(logits, torch.tensor(labels).long()).item(), rel=1e-5),
        "top1": pytest.approx(100 * np.mean(logits.argmax(1).numpy() == labels), rel=1e-6),
    }
    assert evaluate(as_nnx(variables, dropout=0.5), None, BATCHES) == pytest.approx(found, rel=1e-5)


def test_an_evaluation_with_a_loss_of_its_own_weighs_batches_by_their_images():
    def double(variables, x):
        return {"value": x * variables["factor"], "unused": x}

    batches = [(np.float32([[1], [2]]), np.float32([[0], [0]])), (np.float32([[4]]), np.float32([[1]]))]
    found = evaluate(double, {"factor": np.float32(2)}, batches, loss=squared_error, outputs="value")
    assert found == {"loss": pytest.approx((2**2 + 4**2 + 7**2) / 3)}


@pytest.mark.parametrize(
    "batches, variables, message",
    [
        ([], random_variables(Net()), "batches is empty"),
        ([(BATCHES[0][0], BATCHES[0][1] + 10)], random_variables(Net()), "of batch 0 is outside 0..9"),
        (BATCHES, jax.tree.map(lambda x: x * np.float32("nan"), random_variables(Net())), "values that are NaN"),
    ],
)
def test_evaluations_that_would_be_wrong_are_refused(batches, variables, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Net(), variables, batches)


class NnxNet(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x))).mean((1, 2))
        return self.head(self.dropout(x))


def as_nnx(variables, **options):
    """The linen network's variables in the nnx module."""
    module = NnxNet(nnx.Rngs(0), **options)
    params, stats = variables["params"], variables["batch_stats"]["bn"]
    module.conv.kernel[...] = params["conv"]["kernel"]
    module.bn.scale[...], module.bn.bias[...] = params["bn"]["scale"], params["bn"]["bias"]
    module.bn.mean[...], module.bn.var[...] = stats["mean"], stats["var"]
    module.head.kernel[...], module.head.bias[...] = params["head"]["kernel"], params["head"]["bias"]
    return module


def test_nnx_modules_train_as_linen_modules_do():
    variables = random_variables(Net())
    linen = fit(Net(), variables, BATCHES, steps=3, progress=False)
    module = as_nnx(variables)
    fitted = fit(module, None, BATCHES, steps=3, progress=False)
    np.testing.assert_allclose(fitted.history["loss"], linen.history["loss"], rtol=1e-5)
    assert fitted.variables is None
    for found, wanted in (
        (fitted.model.conv.kernel, linen.variables["params"]["conv"]["kernel"]),
        (fitted.model.bn.bias, linen.variables["params"]["bn"]["bias"]),
        (fitted.model.bn.var, linen.variables["batch_stats"]["bn"]["var"]),
    ):
        np.testing.assert_allclose(found[...], wanted, atol=1e-6)
    np.testing.assert_array_equal(module.conv.kernel[...], variables["params"]["conv"]["kernel"])  # its own stay


def test_nnx_dropout_follows_the_seed():
    module = as_nnx(random_variables(Net()), dropout=0.5)
    losses = [fit(module, None, BATCHES, steps=2, seed=seed, progress=False).history["loss"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert np.all(losses[0] != losses[2])


def test_functions_train_with_losses_of_their_own():
    rng = np.random.default_rng(0)
    x, weight = np.float32(rng.normal(size=(16, 3))), np.float32([1.0, -2.0, 0.5])
    targets = {"value": x @ weight}

    def linear(variables, x):
        return {"value": x @ variables["w"], "kind": variables["count"]}

    def squared(outputs, targets):
        return jnp.mean((outputs["value"] - targets["value"]) ** 2)

    start = {"w": np.zeros(3, np.float32), "count": np.int32(7)}
    arguments = {"steps": 100, "learning_rate": 0.1, "weight_decay": 0.0, "progress": False}
    fitted = fit(linear, start, [(x, targets)], loss=squared, **arguments)
    w, velocity = np.zeros(3), np.zeros(3)
    for step in range(100):
        velocity = 0.9 * velocity + 2 * x.T.astype(float) @ (x @ w - x @ weight) / len(x)
        w = w - 0.1 * (1 + np.cos(np.pi * step / 100)) / 2 * velocity
    assert np.max(np.abs(w - weight)) < 0.02
    np.testing.assert_allclose(fitted.variables["w"], w, atol=1e-5)
    assert (set(fitted.history), int(fitted.variables["count"]), fitted.model) == ({"loss"}, 7, linear)
    picked = fit(
        linear, start, [(x, targets["value"])], loss=lambda y, t: jnp.mean((y - t) ** 2), outputs="value", **arguments
    )
    np.testing.assert_allclose(picked.history["loss"], fitted.history["loss"], rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"^label_smoothing=0\.1 is for the default loss; smooth the targets in loss=\.$"
    ):
        fit(linear, start, [(x, targets)], loss=squared, label_smoothing=0.1, **arguments)


# Batches


class Readable:
    """Batches that are created anew on every iteration."""

    def __init__(self):
        self.times = 0

    def __iter__(self):
        self.times += 1
        return iter(BATCHES)


def test_batches_are_read_again_where_they_end():
    readable = Readable()
    fitted = fit(Net(), random_variables(Net()), readable, steps=5, progress=False)
    assert readable.times == 3
    wanted = fit(Net(), random_variables(Net()), BATCHES * 3, steps=5, progress=False)
    np.testing.assert_array_equal(fitted.history["loss"], wanted.history["loss"])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            lambda: iter(BATCHES),
            r"^the batches ended after 2 of 5 steps and cannot be iterated again; give a list",
        ),
        (list, r"^the batches ended after 0 of 5 steps"),
        (lambda: [BATCHES[0][0]], r"^batch 0 is of type ndarray; .*: \[\(images, targets\)\] for a single one\.$"),
    ],
)
def test_batches_that_cannot_be_meant_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        fit(Net(), random_variables(Net()), batches(), steps=5, progress=False)


def test_labels_that_are_no_classes_of_the_network_are_refused():
    images, labels = BATCHES[0]
    for bad, message in (
        (labels + 1, r"^label 10 of image \d+ of batch \d is outside 0\.\.9, the 10 classes of Net;"),
        (
            labels / 2,
            r"^the targets of batch 1 are float32 \(16,\), and must be whole numbers \(16,\), one label per image;",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Net(), random_variables(Net()), [BATCHES[1], (images, bad)], steps=2, progress=False)


def test_a_loss_that_is_not_finite_stops_with_its_step():
    (images, _), classes = BATCHES[0], zero_targets()
    good, bad = (images, classes), (images, np.full_like(classes, np.nan))
    for batches, step in (([good, bad, good], 2), ([good, good, bad], 3)):
        with pytest.raises(FloatingPointError, match=rf"^the loss is nan at step {step}; lower the learning rate"):
            fit(Net(), random_variables(Net()), batches, steps=3, loss=squared_error, progress=False)


def zero_targets():
    outputs = Net().apply(random_variables(Net()), BATCHES[0][0])
    return np.zeros(outputs.shape, np.float32)


def squared_error(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def test_progress_names_step_and_loss(capsys):
    fitted = fit(Net(), random_variables(Net()), BATCHES, steps=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"fit: step 1 of 3, loss {fitted.history['loss'][0]:.4f}"
    fit(Net(), random_variables(Net()), BATCHES, steps=2, progress=False)
    assert capsys.readouterr().err == ""


# Searches


def quick(**fields):
    return ddnp.build(make_problem(steps=4, **fields))


def test_a_search_draws_what_the_job_draws():
    search, batches = quick(), [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    state, history = methods.run_search(search, VARIABLES, batches, seed=3, progress=False)
    wanted, losses = search.init(jax.random.key(3)), []
    for number in range(4):  # the job's formula
        rng, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), number))
        wanted, metrics = jax.jit(search.step)(wanted, VARIABLES, batches[number % 2], rng)
        losses.append(metrics["loss"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state, wanted)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-6)
    assert {"cross_entropy", "top1", "remaining", "resource_loss", "tie_loss"} < set(history)


def test_methods_search_by_an_own_loss():
    """With the cross-entropy given as a custom loss, the same gradients."""

    def own(outputs, labels):
        return -jnp.mean(jnp.take_along_axis(nn.log_softmax(outputs), labels[:, None], axis=-1))

    batches = [(IMAGES, LABELS)]
    problem = make_problem(steps=2)
    state, history = methods.run_search(ddnp.build(problem), VARIABLES, batches, progress=False)
    other = ddnp.build(problem._replace(loss=own))
    own_state, own_history = methods.run_search(other, VARIABLES, batches, progress=False)
    np.testing.assert_allclose(own_history["task_loss"], history["cross_entropy"], rtol=1e-5)
    assert "top1" not in own_history
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), own_state.params, state.params)


def test_nppm_remembers_the_performance():
    def problem(**options):
        config = methods.configure("nppm", {"predictor": "linear", "memory_steps": 1})
        return methods.Problem(Tiny(), VARIABLES, topology(), Budget(topology(), 0.4), config, 2, **options)

    def own(outputs, labels):
        return jnp.mean((outputs - jax.nn.one_hot(labels, outputs.shape[-1])) ** 2)

    def remembered(**options):
        search = nppm.build(problem(**options))
        return methods.run_search(search, VARIABLES, [(IMAGES, LABELS)], progress=False)

    state, history = remembered()
    np.testing.assert_allclose(state.memory.accuracy[:2], history["top1"] / 100, rtol=1e-6)
    state, history = remembered(loss=own)
    np.testing.assert_allclose(state.memory.accuracy[:2], np.exp(-history["task_loss"]), rtol=1e-6)
    state, history = remembered(loss=own, performance=lambda outputs, labels: jnp.float32(0.25) + 0 * outputs.sum())
    np.testing.assert_allclose(state.memory.accuracy[:2], [0.25, 0.25])
    np.testing.assert_allclose(history["performance"], [0.25, 0.25])


def test_keys_keep_their_kind_on_the_host():
    tree = {"key": jax.random.key(5), "x": jnp.ones(2)}
    fetched = fitting.parallel.fetch(tree)
    assert jax.random.uniform(fetched["key"]) == jax.random.uniform(jax.random.key(5))
    assert isinstance(fetched["x"], np.ndarray)


def test_the_last_step_is_shown_and_a_result_prints_in_one_line(capsys):
    fitted = fit(Net(), random_variables(Net()), BATCHES * 8, steps=13)
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in shown] == [f"fit: step {n} of 13" for n in range(1, 14)]
    assert shown[-1].endswith(f"loss {fitted.history['loss'][-1]:.4f}")
    loss, top1 = (fitted.history[name][-1] for name in ("loss", "top1"))
    assert str(fitted) == f"Net after 13 steps: loss {loss:.4g}, top1 {top1:.4g}"
    longer = fit(Net(), random_variables(Net()), BATCHES * 8, steps=25)
    assert capsys.readouterr().err.splitlines()[-1] == f"fit: step 25 of 25, loss {longer.history['loss'][-1]:.4f}"
