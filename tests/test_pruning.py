"""The high-level interface, with all kinds of networks and losses."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx

import ddnp_jax
from ddnp_jax import flops, losses, methods
from ddnp_jax.cost.budget import Budget, Cost, floors_of

SHAPE = (8, 8, 3)


def batches(targets, count=3, size=8, seed=0):
    """Batches of random images, with `targets(rng, size)`."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, *SHAPE)).astype(np.float32), targets(rng, size)) for _ in range(count)]


def labels(rng, size):
    return rng.integers(0, 7, size).astype(np.int32)


FAST = {"importance": "scalar", "width": "scalar"}  # compiles in a fraction of the generators' time


def prune(model, variables, given, p=0.5, **arguments):
    return ddnp_jax.prune(model, variables, given, p, progress=False, **arguments)


class Small(nn.Module):
    """Two convolutions and a classifier."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not training)(nn.Conv(8, (3, 3), name="first")(x)))
        x = nn.relu(nn.BatchNorm(use_running_average=not training)(nn.Conv(12, (3, 3), name="second")(x)))
        return nn.Dense(7, name="classifier")(x.mean((1, 2)))


class SmallNnx(nnx.Module):
    """The same network."""

    def __init__(self, rngs):
        self.first, self.norm1 = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.second, self.norm2 = nnx.Conv(8, 12, (3, 3), rngs=rngs), nnx.BatchNorm(12, rngs=rngs)
        self.classifier = nnx.Linear(12, 7, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm2(self.second(nnx.relu(self.norm1(self.first(x))))))
        return self.classifier(x.mean((1, 2)))


def small_function(variables, x):
    """The same network in evaluation mode, by hand."""
    for name, norm in (("first", "norm1"), ("second", "norm2")):
        layer, statistics = variables[name], variables[norm]
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def wide(leaf):
            return leaf[None, None, None]

        scale = statistics["scale"] * jax.lax.rsqrt(statistics["var"] + 1e-5)
        x = jax.nn.relu((x + wide(layer["bias"] - statistics["mean"])) * wide(scale) + wide(statistics["bias"]))
    return x.mean((1, 2)) @ variables["classifier"]["kernel"] + variables["classifier"]["bias"][None]


def three_of_one():
    """One network as a linen module, an nnx module and a function: (model, variables)."""
    variables = zoo.randomized(Small(), SHAPE)
    params, stats = variables["params"], variables["batch_stats"]
    pure = {name: params[name] for name in ("first", "second", "classifier")}
    pure |= {f"norm{i + 1}": {**params[f"BatchNorm_{i}"], **stats[f"BatchNorm_{i}"]} for i in (0, 1)}
    module = SmallNnx(nnx.Rngs(0))
    state = nnx.state(module)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(module, state)
    return {"linen": (Small(), variables), "nnx": (module, None), "function": (small_function, pure)}


@pytest.mark.parametrize("method", ["ddnp", "magnitude"])
def test_the_same_network_of_three_kinds_is_pruned_to_the_same_channels(method):
    given = batches(labels)
    steps = {"steps": 6, **FAST} if methods.METHODS[method].steps else {}
    networks = three_of_one()
    pruned = {kind: prune(*network, given, method=method, **steps) for kind, network in networks.items()}
    x = given[0][0]
    outputs = {
        "linen": pruned["linen"].model.apply(pruned["linen"].variables, x),
        "nnx": ddnp_jax.networks.as_network(pruned["nnx"].model).evaluate(
            ddnp_jax.networks.as_network(pruned["nnx"].model).variables(None), x
        ),
        "function": pruned["function"].model(pruned["function"].variables, x),
    }
    for kind, found in pruned.items():
        assert found.selection == pruned["linen"].selection, kind
        assert flops.prunable(found.topology, found.selection.widths) <= 0.5 * flops.prunable(found.topology)
        first, second = found.selection.widths
        kept = 64 * 9 * (3 * first + first * second) + 7 * second
        assert found.flops_kept == kept / (64 * 9 * (3 * 8 + 8 * 12) + 7 * 12)
        np.testing.assert_allclose(outputs[kind], outputs["linen"], atol=1e-4)
    small = jax.tree.leaves(pruned["linen"].variables["params"])
    counted = flops.parameters(pruned["linen"].topology, pruned["linen"].selection.widths)
    assert sum(leaf.size for leaf in small) == counted
    assert (pruned["nnx"].variables, pruned["function"].model) == (None, small_function)
    if steps:
        assert {len(values) for values in pruned["linen"].history.values()} == {6}
        assert "The search has not converged: k and the open part" in pruned["linen"].describe()


def test_the_variables_of_another_network_are_refused_beside_an_nnx_module():
    module, _ = three_of_one()["nnx"]
    _, variables = three_of_one()["linen"]
    sentence = "^the variables are not those of SmallNnx, an nnx module, which holds its own; give variables=None"
    with pytest.raises(ValueError, match=sentence):
        ddnp_jax.prune(module, variables, [])


def test_an_nnx_module_is_left_as_it_was():
    module, _ = three_of_one()["nnx"]
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
    prune(module, None, batches(labels), steps=3, **FAST)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module)))
    assert module.first.out_features == 8


# Losses of one's own


class Dense(nn.Module):
    """A network with a map of logits and an embedding, for segmentation."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(12, (3, 3), name="second")(x))
        return {"map": nn.Conv(4, (1, 1), name="head")(x), "embedding": nn.Dense(2, name="embed")(x.mean((1, 2)))}


def multi_label(logits, targets):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))


def regression(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def segmentation(logits, targets):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


LOSSES = {
    "multi-label": (Small(), multi_label, None, lambda rng, n: rng.integers(0, 2, (n, 7)).astype(np.float32)),
    "regression": (Small(), regression, None, lambda rng, n: rng.normal(size=(n, 7)).astype(np.float32)),
    "segmentation": (Dense(), segmentation, "map", lambda rng, n: rng.integers(0, 4, (n, *SHAPE[:2]))),
}


@pytest.mark.parametrize(("kind", "method"), list(zip(LOSSES, ("ddnp", "nppm", "ddnp"), strict=True)))
def test_own_losses(kind, method):
    model, loss, outputs, targets = LOSSES[kind]
    variables, given = zoo.randomized(model, SHAPE), batches(targets)
    fields = FAST if method == "ddnp" else {}
    pruned = prune(model, variables, given, method=method, steps=4, loss=loss, outputs=outputs, **fields)
    assert pruned.verification.max_difference < 1e-4
    first = pruned.history["task_loss"][0]
    masks = [jnp.ones(gate.channels) for gate in pruned.topology.gates]
    found = ddnp_jax.apply_masked(model, variables, given[0][0], masks, pruned.topology)
    whole = loss(found if outputs is None else found[outputs], given[0][1])
    # Nearly all gates are open in the first step, so that the loss is about that of the whole network.
    assert first == pytest.approx(float(whole), rel=0.5)


def test_performance_is_what_nppm_learns():
    seen = []

    def performance(outputs, targets):
        seen.append(outputs.shape)
        return jnp.clip(1 - jnp.mean(jnp.abs(outputs - targets)), 0, 1)

    given = batches(LOSSES["regression"][3])
    variables = zoo.randomized(Small(), SHAPE)
    pruned = prune(Small(), variables, given, method="nppm", steps=3, loss=regression, performance=performance)
    assert seen[0] == (8, 7)
    assert (pruned.history["performance"] >= 0).all()


# Budgets and gates


def test_floors_and_kept_gates():
    variables, given = zoo.randomized(Small(), SHAPE), batches(labels)
    whole = prune(Small(), variables, given, 0.6, method="uniform")
    assert [gate.name for gate in whole.topology.gates] == ["first", "second"]
    found = prune(Small(), variables, given, 0.7, method="uniform", floors={"second": 11})
    assert found.selection.widths[1] >= 11
    assert found.budget.cost(found.selection.widths) <= found.budget.wanted
    for floors, least in (
        ({"second": 0.9}, (1, 11)),
        (lambda gate: gate.channels - 1, (7, 11)),
        (0.5, (4, 6)),
        (3, (3, 3)),
    ):
        assert floors_of(whole.topology, floors) == least
    kept = prune(Small(), variables, given, 0.6, method="uniform", keep="second")
    assert [gate.name for gate in kept.topology.gates] == ["first"]
    assert kept.variables["params"]["classifier"]["kernel"].shape == (12, 7)
    multiple = prune(Small(), variables, given, 0.6, method="uniform", multiple=4)
    assert all(width % 4 == 0 for width in multiple.selection.widths)


def test_another_budget_and_residual_streams():
    model = zoo.PreActResNet()
    variables, given = zoo.randomized(model, SHAPE), batches(labels)
    topology = ddnp_jax.trace(model, SHAPE, residual=True)
    budget = Budget(topology, 0.4, Cost(flops.parameters, "parameters"))
    pruned = prune(model, variables, given, budget=budget, method="magnitude")
    assert pruned.topology is topology
    assert flops.parameters(topology, pruned.selection.widths) <= 0.4 * flops.parameters(topology)
    assert prune(model, variables, given, 0.5, residual=True, method="magnitude").topology == topology


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dnpp"}, r"method='dnpp' is unknown; choose one of ddnp, nppm"),
        ({"tie_wait": 1.0}, r"prune has no argument 'tie_wait' and ddnp no such field; did you mean 'tie_weight'\?"),
        ({"residul": True}, r"did you mean 'residual'\?"),
        ({"colour": 1}, r"ddnp has no field 'colour'; its fields are resource_loss, "),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1: ddnp searches on batches"),
        ({"p": "0.5"}, r"p='0\.5' must be in \(0, 1\]"),
        ({"multiple": 2.5}, r"multiple=2\.5 must be a whole number of at least 1"),
        ({"keep": lambda gate: True}, r"has no gate to prune; these stay unpruned: first \(`keep` names it\); second"),
        (
            {"loss": lambda outputs, targets: outputs["logits"]},
            r"loss= cannot be computed from the outputs \(an array \(8, 7\)\) of Small and targets \(an array",
        ),
        (
            {"loss": lambda outputs, targets: outputs[:, 0]},
            r"loss= returns an array \(8,\) from .* must return one flo",
        ),
        ({"performance": lambda outputs, targets: targets[0]}, r"performance= returns an array \(\) from .* one float"),
        ({"p": 0.001}, r"p=0.001 cannot be met: .* use p of at least 0\."),
        ({"p": 1.5}, r"p=1.5 must be in \(0, 1\]"),
        ({"floors": {"third": 2}}, "floors names 'third', which is not a gate; the gates are first, second"),
        (
            {"floors": 9},
            r"the floor of gate first is 9; it must be a fraction below 1, or a whole number from 1 to its 8",
        ),
        ({"keep": ["third"]}, "keep names 'third', which is not a gate"),
        ({"input_shape": (9, 9, 3)}, None),
        ({"outputs": "logits"}, r"Small returns an array .*, which has no outputs='logits'"),
    ],
)
def test_mistakes_are_named_before_any_search(arguments, message):
    variables = zoo.randomized(Small(), SHAPE)
    if message is None:
        with pytest.raises(ValueError, match="the images have shape"):
            prune(Small(), variables, batches(labels), steps=1, **arguments)
        return
    with pytest.raises(ValueError, match=message):
        prune(Small(), variables, batches(labels), **arguments)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            lambda rng, n: rng.integers(5, 9, n),
            r"label [78] of image \d of batch 1 is outside 0..6, the 7 classes",
        ),
        (lambda rng, n: rng.integers(-1, 0, n), "label -1 of image 0 of batch 1 is outside"),
        (
            lambda rng, n: rng.normal(size=n).astype(np.float32),
            r"the targets of batch 1 are float32 \(8,\), and must be whole",
        ),
        (
            lambda rng, n: np.eye(7, dtype=np.int32)[rng.integers(0, 7, n)],
            r"the targets of batch 1 are int32 \(8, 7\), and",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(targets, message):
    variables, given = zoo.randomized(Small(), SHAPE), batches(labels, count=1) + batches(targets, count=1, seed=4)
    with pytest.raises(ValueError, match=message):
        prune(Small(), variables, given, method="taylor", steps=2)
    with pytest.raises(ValueError, match=message):
        ddnp_jax.fit(Small(), variables, given, steps=2, progress=False)


def test_outputs_that_are_no_logits_are_refused():
    variables = zoo.randomized(Dense(), SHAPE)
    with pytest.raises(ValueError, match=r"Dense returns \['embedding'\].*select one of them with outputs="):
        prune(Dense(), variables, batches(labels))
    with pytest.raises(ValueError, match=r"Dense returns outputs \(8, 8, 8, 4\), which are not logits \(N, K\); if"):
        prune(Dense(), variables, batches(labels), outputs="map")


def test_batches_that_end_and_weights_that_are_not_finite():
    variables, given = zoo.randomized(Small(), SHAPE), batches(labels)
    with pytest.raises(ValueError, match="the batches ended after 3 of 5 steps and cannot be iterated again"):
        prune(Small(), variables, iter(given), steps=5, **FAST)
    assert (
        prune(Small(), variables, iter(given), steps=3, **FAST).selection
        == prune(Small(), variables, given, steps=3, **FAST).selection
    )
    with pytest.raises(ValueError, match="batches is empty"):
        prune(Small(), variables, [])
    variables["params"]["second"]["kernel"] = variables["params"]["second"]["kernel"].copy()
    variables["params"]["second"]["kernel"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="variable params/second/kernel of Small has 1 values that are NaN"):
        prune(Small(), variables, given)


def test_images_that_are_not_finite_and_variables_of_another_network():
    variables, given = zoo.randomized(Small(), SHAPE), batches(labels)
    for refuse in (ddnp_jax.fit, prune):
        with pytest.raises(ValueError, match="the images of batch 0 contain NaN or infinite values"):
            refuse(Small(), variables, [(x * np.nan, y) for x, y in given], steps=1)
    with pytest.raises(ValueError, match=r"variable batch_stats/BatchNorm_0/mean has shape \(6,\), and \(8,\) in"):
        prune(Small(), zoo.randomized(Numbers(), SHAPE), given)
    with pytest.raises(ValueError, match=r"^variable batch_stats/BatchNorm_0/mean of Small is missing; give all"):
        prune(Small(), {"params": variables["params"]}, given)


class Switched(nn.Module):
    """A network whose argument for the mode has a name of its own."""

    @nn.compact
    def __call__(self, x, in_training=False):
        x = nn.BatchNorm(use_running_average=not in_training)(nn.Conv(8, (3, 3))(x))
        return nn.Dense(7)(nn.relu(x).mean((1, 2)))


def test_a_mode_of_another_name_is_named_instead_of_training_in_evaluation_mode():
    variables, given = zoo.randomized(Switched(), SHAPE), batches(labels)
    with pytest.raises(ValueError, match=r"^Switched is called with 'in_training', which is not known .* train, train"):
        ddnp_jax.fit(Switched(), variables, given, steps=1)
    assert prune(Switched(), variables, given, p=0.5, method="magnitude").selection.widths[0] < 8  # needs no training


def test_a_class_is_no_network():
    with pytest.raises(TypeError, match=r"^Small is a class and not a network; create one, as in Small\(\)\.$"):
        prune(Small, None, batches(labels))


def test_images_with_channels_first_are_named():
    variables, given = zoo.randomized(Small(), SHAPE), [(x.transpose(0, 3, 1, 2), y) for x, y in batches(labels)]
    for refuse in (functools.partial(prune, steps=1), functools.partial(ddnp_jax.fit, steps=1)):
        with pytest.raises(ValueError, match=r"images are \(N, H, W, C\), and these look like \(N, C, H, W\)\.$"):
            refuse(Small(), variables, given)


class Numbers(nn.Module):
    """Another network with some of the same names."""

    @nn.compact
    def __call__(self, x, training=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not training)(nn.Conv(6, (3, 3), name="first")(x)))
        return nn.Dense(7, name="classifier")(x.mean((1, 2)))


def test_what_was_done_is_described():
    variables = zoo.randomized(Small(), SHAPE)
    pruned = prune(Small(), variables, batches(labels), method="uniform")
    lines = repr(pruned).splitlines()
    assert lines[0].startswith("multiply-accumulates: 69,204 -> ")
    assert lines[1].startswith("parameters: 1,231 -> ")
    widths = pruned.selection.widths
    assert lines[3] == "  8% of the budget is unused: at these widths no gate can be a step wider within it."
    assert lines[4:6] == [f"  first: {widths[0]} of 8", f"  second: {widths[1]} of 12"]


def test_labels_are_checked_against_literal_shapes():
    losses.check_labels((3, 4), np.array([0, 3, 1]))
    with pytest.raises(ValueError, match=r"label 4 of image 2 of batch 0 is outside 0\.\.3"):
        losses.check_labels((3, 4), np.array([0, 3, 4]))
    for (shape, given), _ in zip(itertools.product([(3,), (3, 4, 5)], [np.array([0, 1, 2])]), range(4), strict=False):
        with pytest.raises(ValueError, match="which are not logits"):
            losses.check_labels(shape, given)
