import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx

from ddnp_jax import models
from ddnp_jax.compact import Verification, compact, compare_outputs, rehearse, verify
from ddnp_jax.masking import apply_masked
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import Selection, trace

SHAPE = (8, 8, 3)


def pairs(widths):
    return tuple(zip(widths[::2], widths[1::2], strict=True))


# model, residual gates, module of the smaller widths
CASES = {
    "resnet20 subsample": (models.create("resnet20", 7), False, None),
    "resnet20 avgpool": (models.create("resnet20", 7, shortcut="avgpool"), False, None),
    "vgg": (zoo.VGG(), False, lambda widths: zoo.VGG(features=widths)),
    "inverted residuals": (zoo.MobileNet(), False, lambda widths: zoo.MobileNet(channels=widths)),
    "bottlenecks": (zoo.PreActResNet(), False, lambda widths: zoo.PreActResNet(inner=pairs(widths))),
    "residual gates": (
        zoo.PreActResNet(),
        True,
        lambda w: zoo.PreActResNet(inner=(w[1:3], w[4:6], w[6:8]), outer=(w[0], w[3])),
    ),
    "unknown operation": (zoo.Sorted(), False, lambda w: zoo.Sorted(features=w)),
    "shared": (zoo.Twice(), False, lambda widths: zoo.Twice(features=widths)),
    "multiplier": (zoo.Multiplier(), False, lambda widths: zoo.Multiplier(features=widths)),
    "own kernel": (zoo.OwnKernels(), False, lambda widths: zoo.OwnKernels(features=widths)),
}


def selection_of(topology, kind, seed=0):
    rng = np.random.default_rng(seed)
    counts = {"all": lambda n: n, "one": lambda n: 1, "random": lambda n: int(rng.integers(1, n))}
    kept = [rng.choice(n, counts[kind](n), replace=False) for n in topology.widths]
    return Selection(tuple(tuple(sorted(map(int, each))) for each in kept))


def images(n=4):
    return np.random.default_rng(1).normal(size=(n, *SHAPE)).astype(np.float32)


apply = jax.jit(lambda model, variables, x: model.apply(variables, x), static_argnums=0)


@pytest.mark.parametrize("name", CASES)
def test_cutting_is_masking(name):
    model, residual, rebuild = CASES[name]
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE, residual=residual)
    masked = jax.jit(lambda masks: apply_masked(model, variables, images(), masks, topology))
    whole = np.asarray(apply(model, variables, images()))
    # Own kernels: its code adds slices of a parameter that is sized by a tuple.
    ways = (rebuild,) if name == "own kernel" else dict.fromkeys((None, rebuild))
    for kind, way in itertools.product(("random", "one", "all"), ways):
        selection = selection_of(topology, kind)
        expected = np.asarray(masked(selection.masks(topology)))
        small_model, small_variables = compact(model, variables, selection, topology, way)
        logits = np.asarray(apply(small_model, small_variables, images()))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        assert (kind == "all") == np.allclose(logits, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def test_cut_variables_are_the_kept_slices():
    model = zoo.VGG()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    selection = Selection(((1, 4), (0, 2, 7), (3, 9), (5,)))
    _, small = compact(model, variables, selection, topology, lambda widths: zoo.VGG(features=widths))
    params = variables["params"]
    kernel = params["features_1"]["kernel"]
    np.testing.assert_array_equal(small["params"]["features_1"]["kernel"], kernel[:, :, [1, 4]][..., [0, 2, 7]])
    flattened = [10 * position + channel for position in range(4) for channel in (3, 9)]
    np.testing.assert_array_equal(small["params"]["hidden"]["kernel"], params["hidden"]["kernel"][flattened][:, [5]])
    np.testing.assert_array_equal(small["params"]["classifier"]["kernel"], params["classifier"]["kernel"][[5]])
    np.testing.assert_array_equal(small["params"]["classifier"]["bias"], params["classifier"]["bias"])
    statistics = variables["batch_stats"]["norm_1"]
    np.testing.assert_array_equal(small["batch_stats"]["norm_1"]["mean"], statistics["mean"][[0, 2, 7]])
    np.testing.assert_array_equal(small["batch_stats"]["norm_1"]["var"], statistics["var"][[0, 2, 7]])


def vgg_cut():
    model = zoo.VGG()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    selection = Selection(((1, 3, 5), (0, 2, 5, 7), (1, 2, 8, 9), (2, 3, 6, 11)))
    small_model, small = compact(model, variables, selection, topology, lambda widths: zoo.VGG(features=widths))
    return model, variables, small_model, small, selection, topology, images()


@pytest.mark.parametrize(
    ("layer", "leaf", "axis"),
    [("features_1", "kernel", 3), ("features_2", "kernel", 2), ("features_1", "bias", 0), ("norm_1", "scale", 0)],
)
def test_verify_fails_when_two_kept_channels_are_swapped(layer, leaf, axis):
    arguments = vgg_cut()
    params = arguments[3]["params"]
    params[layer][leaf] = jnp.take(params[layer][leaf], jnp.array([0, 2, 1, 3]), axis)
    with pytest.raises(ValueError, match="does not compute what the masked one does: logits differ by up to"):
        verify(*arguments)


def test_verify_measures_the_difference():
    arguments = vgg_cut()
    assert verify(*arguments).argmax_agreement == 1.0
    bias = arguments[3]["params"]["classifier"]["bias"]
    arguments[3]["params"]["classifier"]["bias"] = bias.at[2].add(0.25)
    verification = verify(*arguments, tolerance=1.0)
    assert verification.max_difference == pytest.approx(0.25, abs=1e-4)
    arguments[3]["params"]["classifier"]["bias"] = bias.at[2].add(1e6)
    assert verify(*arguments, tolerance=1e9).argmax_agreement == np.mean(predictions(arguments) == 2)


def predictions(arguments):
    """Classes that the masked network predicts."""
    model, variables, _, _, selection, topology, x = arguments
    return apply_masked(model, variables, x, selection.masks(topology), topology).argmax(-1)


def test_verify_fails_for_another_selection_and_for_nan():
    model, variables, small_model, small, selection, topology, x = vgg_cut()
    other = Selection(((1, 3, 4), *selection.kept[1:]))
    with pytest.raises(ValueError, match="logits differ"):
        verify(model, variables, small_model, small, other, topology, x)
    small["params"]["classifier"]["bias"] *= np.nan
    with pytest.raises(ValueError, match="params/classifier/bias of the smaller network has 7 values that are NaN"):
        verify(model, variables, small_model, small, selection, topology, x)


def test_verify_looks_at_the_variables_because_a_relu_may_hide_nan():
    model, variables, small_model, small, selection, topology, x = vgg_cut()
    for network in (variables, small):
        network["batch_stats"]["norm_0"]["mean"] = network["batch_stats"]["norm_0"]["mean"] * np.nan
    with pytest.raises(ValueError, match="batch_stats/norm_0/mean of the network has 6 values that are NaN or inf"):
        verify(model, variables, small_model, small, selection, topology, x)


def test_compact_names_what_does_not_fit():
    model = models.create("resnet20", 7)
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    selection = Selection(tuple((1, 3, 5, 7) for _ in topology.gates))
    with pytest.raises(ValueError, match="the selection has 8 gates, the network 9"):
        compact(model, variables, Selection(selection.kept[1:]), topology)
    with pytest.raises(ValueError, match=r"variable params/linear/bias has shape \(10,\); .* with \(7,\)"):
        compact(model, zoo.randomized(models.create("resnet20", 10), SHAPE), selection, topology)
    with pytest.raises(
        ValueError, match=r"expects batch_stats/layer1_1/bn1/mean with shape \(5,\), the cut gives \(4,\)"
    ):
        compact(model, variables, selection, topology, lambda w: model.clone(widths=(4, 5, *w[2:])))
    with pytest.raises(ValueError, match=r"OwnKernels cannot be called with fewer channels|expects params/"):
        own = zoo.OwnKernels()
        found = trace(own, SHAPE)
        compact(own, zoo.randomized(own, SHAPE), selection_of(found, "one"), found)


class Numbers(nn.Module):
    """A network whose code scales by its own number of channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(5, (3, 3), name="scaled")(x))
        return nn.Dense(7, name="classifier")(x.mean((1, 2)) / x.shape[-1])


class ByChance(nn.Module):
    """A network that adds a shortcut wherever shapes happen to be equal."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        y = nn.relu(nn.Conv(12, (3, 3), name="second")(x))
        y = x + y if x.shape == y.shape else y
        return nn.Dense(7, name="classifier")(y.mean((1, 2)))


def test_a_shortcut_that_equal_widths_would_add_is_found_before_any_search():
    model = ByChance()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    assert topology.widths == (8, 12)
    with pytest.raises(
        ValueError, match=r"something else with fewer channels \(4 add instead of 3\), because its code"
    ):
        rehearse(model, variables, topology, (1, 1))
    kept = trace(model, SHAPE, keep=("second",))
    rehearse(model, variables, kept, (1,))


def test_a_rehearsal_names_the_gate_that_cannot_be_cut():
    model = Numbers()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    with pytest.raises(ValueError, match=r"logits differ by .* It happens at the gates 'scaled': keep=\('scaled',\)"):
        rehearse(model, variables, topology, (1, 1))
    kept = trace(model, SHAPE, keep=("scaled",))
    assert [gate.name for gate in kept.gates] == ["first"]
    rehearse(model, variables, kept, (1,))
    assert trace(model, SHAPE, keep=lambda gate: gate.channels < 6).gates == kept.gates
    with pytest.raises(ValueError, match="keep names 'second', which is not a gate; the gates are first, scaled"):
        trace(model, SHAPE, keep=("second",))


def test_verify_sees_as_much_where_the_network_computes_in_bfloat16():
    model = models.create("resnet20", 10, dtype=jnp.bfloat16)
    topology = trace(model, (8, 8, 3))
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    selection = Selection(tuple(tuple(range(0, width, 3)) for width in topology.widths))
    small_model, small_variables = compact(model, variables, selection, topology)
    assert small_model.dtype == jnp.bfloat16
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    assert verify(model, variables, small_model, small_variables, selection, topology, x).max_difference < 1e-5


class Short(nn.Module):
    """Computes in bfloat16, set by an attribute with an unusual name."""

    kind: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate((12, 16, 20)):
            x = nn.Conv(features, (3, 3), dtype=self.kind, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, dtype=self.kind, name=f"norm{i}")(x))
        x = nn.softmax(nn.Dense(9, dtype=self.kind, name="hidden")(x.mean((1, 2))))
        return nn.Dense(7, dtype=self.kind, name="classifier")(x)


@pytest.mark.parametrize(
    "shape", [(4, 4, 3), (8, 8, 3), (8, 8, 1), (16, 16, 3), (16, 8, 3), (5, 7, 3), (32, 32, 1), (12, 20, 3), (6, 6, 2)]
)
def test_correct_cuts_in_bfloat16_pass_and_swapped_channels_do_not(shape):
    model = Short()
    variables, topology = zoo.randomized(model, shape), trace(model, shape)
    selection = selection_of(topology, "random")
    small_model, small = compact(model, variables, selection, topology)
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    arguments = model, variables, small_model, small, selection, topology, x
    assert verify(*arguments).max_difference < 1e-5
    kernel = small["params"]["conv1"]["kernel"]
    small["params"]["conv1"]["kernel"] = kernel[..., jnp.array([1, 0, *range(2, kernel.shape[-1])])]
    with pytest.raises(ValueError, match="does not compute what the masked one does"):
        verify(*arguments)


class Several(nn.Module):
    """A network with two outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="first")(x))
        return {"logits": nn.Dense(7, name="classifier")(x.mean((1, 2))), "map": nn.Conv(2, (1, 1), name="head")(x)}


def test_every_output_is_compared_unless_one_is_picked():
    model = Several()
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    selection = selection_of(topology, "random")
    small_model, small = compact(model, variables, selection, topology)
    arguments = model, variables, small_model, small, selection, topology, images()
    verify(*arguments)
    small["params"]["head"]["bias"] += 1.0
    verify(*arguments, outputs="logits")
    with pytest.raises(ValueError, match="does not compute what the masked one does"):
        verify(*arguments)
    with pytest.raises(ValueError, match=r"which has no outputs='classes'"):
        verify(*arguments, outputs="classes")


def dense_function(variables, x):
    """A plain function; its variables are a list of tuples."""
    for kernel, bias in variables[:-1]:
        x = jax.nn.relu(x @ kernel + bias[None])
    kernel, bias = variables[-1]
    return x @ kernel + bias[None]


def test_a_function_is_cut_saved_and_loaded(tmp_path):
    rng = np.random.default_rng(0)
    sizes = (5, 8, 6, 3)
    variables = [(rng.normal(size=(a, b)), rng.normal(size=b)) for a, b in itertools.pairwise(sizes)]
    variables = jax.tree.map(jnp.float32, variables)
    topology = trace(dense_function, (5,), variables=variables)
    assert [(gate.name, gate.channels) for gate in topology.gates] == [("0", 8), ("1", 6)]
    selection = Selection(((0, 3, 4, 7), (1, 2)))
    small_function, small = compact(dense_function, variables, selection, topology)
    assert small_function is dense_function
    assert [leaf.shape for leaf in jax.tree.leaves(small)] == [(5, 4), (4,), (4, 2), (2,), (2, 3), (3,)]
    x = rng.normal(size=(4, 5)).astype(np.float32)
    verify(dense_function, variables, small_function, small, selection, topology, x)
    save_pruned(tmp_path, small_function, small)
    _, loaded = load_pruned(tmp_path, model=dense_function, variables=variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, small)
    with pytest.raises(ValueError, match="holds a function network, of which only the variables"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match="dense_function is a function, which holds no variables; give variables="):
        trace(dense_function, (5,))


class NnxBlock(nnx.Module):
    def __init__(self, features, rngs):
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.depthwise = nnx.Conv(features, features, (3, 3), feature_group_count=features, rngs=rngs)
        self.groups = nnx.GroupNorm(features, num_groups=4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.groups(self.depthwise(nnx.relu(self.norm(x)))))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.block = NnxBlock(12, rngs)
        self.second = nnx.Conv(12, 10, (1, 1), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.classifier = nnx.Linear(10, 7, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(self.block(self.first(x))))
        return self.classifier(self.dropout(x.mean((1, 2))))


def test_an_nnx_module_is_cut_saved_loaded_and_cut_again(tmp_path):
    model = NnxNet(nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable.get_value() + rng.normal(0, 0.1, variable.get_value().shape).astype(np.float32))
    model.block.norm.mean[...] = jnp.linspace(-1, 1, 12)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    topology = trace(model, SHAPE)
    assert [(gate.name, gate.channels) for gate in topology.gates] == [("first", 4), ("second", 10)]
    selection = Selection(((1, 3), (0, 2, 9)))
    small, nothing = compact(model, None, selection, topology)
    assert nothing is None
    assert (small.first.out_features, small.block.depthwise.feature_group_count) == (6, 6)
    assert (small.block.groups.num_groups, small.second.in_features, small.classifier.in_features) == (2, 6, 3)
    verify(model, None, small, None, selection, topology, images())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    save_pruned(tmp_path, small)
    loaded, _ = load_pruned(tmp_path, model=NnxNet(nnx.Rngs(1)))
    loaded.eval()
    small.eval()
    np.testing.assert_array_equal(loaded(images()), small(images()))
    again = trace(loaded, SHAPE)
    assert again.widths == (2, 3)
    smaller, _ = compact(loaded, None, Selection(((1,), (0, 1))), again)
    verify(loaded, None, smaller, None, Selection(((1,), (0, 1))), again, images())
    with pytest.raises(ValueError, match="holds a nnx network, and model= is a linen network"):
        load_pruned(tmp_path, model=zoo.VGG())


class Inner(nn.Module):
    """A convolution that is called as flax's wrappers call their content."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(8, (3, 3), name="module")(x))


class Outer(nn.Module):
    """A module with a module as attribute, and another one that is created and called independently."""

    body: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (1, 1), name="module")(self.body(x)))
        return nn.Dense(5)(x.mean((1, 2)))


def test_modules_as_attributes_are_cut_and_a_cut_module_may_be_one():
    model = Outer(nn.Sequential([Inner(), nn.Conv(7, (1, 1)), nn.relu]))
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    assert topology.widths == (8, 7, 6)
    selection = selection_of(topology, "random")
    small_model, small = compact(model, variables, selection, topology)
    verify(model, variables, small_model, small, selection, topology, images())
    nested_variables, nested_topology = zoo.randomized(Nested(small_model), SHAPE), trace(Nested(small_model), SHAPE)
    assert nested_topology.widths == selection.widths
    again = selection_of(nested_topology, "one")
    smaller, smallest = compact(Nested(small_model), nested_variables, again, nested_topology)
    verify(Nested(small_model), nested_variables, smaller, smallest, again, nested_topology, images())


class Nested(nn.Module):
    """A module that contains a pruned one."""

    body: nn.Module

    @nn.compact
    def __call__(self, x):
        return 2 * self.body(x)


def test_names_with_slashes_are_saved(tmp_path):
    variables = {"mlp/~/linear_0": {"w": jnp.ones((2, 3))}, "mlp": {"~/b": jnp.zeros(3)}}

    def function(variables, x):
        return x @ variables["mlp/~/linear_0"]["w"] + variables["mlp"]["~/b"][None]

    save_pruned(tmp_path, function, variables)
    _, loaded = load_pruned(tmp_path, model=function)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_outputs_of_any_number_type_are_compared():
    for whole, cut in ((np.array([[True, False]]),) * 2, (np.uint8([[3, 200]]),) * 2):
        assert compare_outputs([(whole, cut)], 0.0, "one", "the other") == Verification(0.0, 1.0)
    with pytest.raises(ValueError, match=r"^one does not .* logits differ by up to 1 \(allowed: 0\.4\)"):
        compare_outputs([(np.uint8([[3, 4]]), np.uint8([[4, 4]]))], 0.1, "one", "the other")
