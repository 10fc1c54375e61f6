import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ddnp_jax import models
from ddnp_jax.cost import flops
from ddnp_jax.topology import trace

SHAPE = (16, 16, 3)
STAGES = ((32, 16), (16, 32), (8, 64))


@functools.cache
def trace_resnet20():
    return trace(models.create("resnet20", 10), (32, 32, 3))


@functools.cache
def trace_mobilenet():
    return trace(zoo.MobileNet(), SHAPE)


traced_prunable = jax.jit(flops.prunable, static_argnums=(0, 2))
traced_parameters = jax.jit(jax.value_and_grad(flops.parameters, argnums=1), static_argnums=0)


def resnet_terms(widths, convention):
    """T of a CIFAR ResNet, written out: (outputs, MACs) of both convolutions of each block."""
    n = len(widths) // 3
    cost, channels = 0, 16
    for i, width in enumerate(widths):
        side, out = STAGES[i // n]
        cost += side * side * 9 * (channels * width + width * out)
        cost += 3 * side * side * (width + out) if convention == "authors" else 0
        channels = out
    return cost


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [("resnet20", 40.551e6, 0.270e6), ("resnet56", 125.486e6, 0.853e6), ("resnet110", 252.888e6, 1.728e6)],
)
def test_known_networks(name, macs, parameters):
    topology = trace(models.create(name, 10), (32, 32, 3))
    assert flops.total(topology) == pytest.approx(macs, abs=500)
    assert flops.parameters(topology) == pytest.approx(parameters, abs=500)
    stem_and_classifier = 32 * 32 * 27 * 16 + 640
    assert flops.total(topology) - flops.prunable(topology) == stem_and_classifier


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=9, max_size=9), st.sampled_from(["macs", "authors"]))
def test_prunable_is_what_one_counts_by_hand(widths, convention):
    topology = trace_resnet20()
    expected = resnet_terms(widths, convention)
    assert flops.prunable(topology, widths, convention) == expected
    assert flops.total(topology, widths, convention) == expected + 32 * 32 * 27 * 16 + 640
    traced = traced_prunable(topology, jnp.array(widths, jnp.float32), convention)
    assert float(traced) == pytest.approx(expected, rel=1e-6)


def test_gradient_is_the_cost_of_one_more_channel():
    topology = trace(zoo.MobileNet(), SHAPE)
    widths = [7, 2, 9, 3, 4, 6]
    for convention in flops.CONVENTIONS:
        gradient = jax.grad(lambda w, c=convention: flops.prunable(topology, w, c))(jnp.array(widths, jnp.float32))
        for i in range(6):
            more = [w + (j == i) for j, w in enumerate(widths)]
            step = flops.prunable(topology, more, convention) - flops.prunable(topology, widths, convention)
            assert float(gradient[i]) == step


@pytest.mark.parametrize(
    ("model", "smaller"),
    [
        (zoo.VGG(), zoo.VGG(features=(3, 4, 5, 6))),
        (zoo.MobileNet(), zoo.MobileNet(channels=(5, 2, 7, 3, 4, 6))),
        (zoo.Multiplier(), zoo.Multiplier(features=(4,))),
        (zoo.Twice(), zoo.Twice(features=(2,))),
    ],
    ids=lambda model: type(model).__name__,
)
def test_cost_of_widths_is_the_cost_of_the_smaller_network(model, smaller):
    topology, small = trace(model, SHAPE), trace(smaller, SHAPE)
    for convention in flops.CONVENTIONS:
        assert flops.total(topology, small.widths, convention) == flops.total(small, None, convention)
        assert flops.prunable(topology, small.widths, convention) == flops.prunable(small, None, convention)
    assert flops.parameters(topology, small.widths) == flops.parameters(small)


def test_layers_of_every_kind_by_hand():
    topology = trace(zoo.MobileNet(), SHAPE)
    stem = 8 * 8 * 27 * 8
    block1 = 64 * (8 * 12 + 9 * 12 + 12 * 8) + 2 * 12 * 4
    block2 = 64 * 8 * 16 + 16 * (9 * 16 + 16 * 10) + 2 * 16 * 5
    assert flops.total(topology) == stem + block1 + block2 + 16 * 10 * 14 + 14 * 7
    outputs = 64 * (12 + 12 + 8) + 4 + 12 + 64 * 16 + 16 * (16 + 10) + 5 + 16 + 16 * 14 + 7
    assert flops.total(topology, None, "authors") == flops.total(topology) + 3 * outputs
    grouped = trace(zoo.Middle(zoo.grouped), SHAPE)
    assert flops.total(grouped) == 256 * (27 * 8 + 9 * 4 * 6) + 6 * 7
    assert flops.total(trace(zoo.Middle(zoo.over_rows), SHAPE)) == 256 * (27 * 8 + 8 * 5) + 5 * 7
    assert flops.total(trace(zoo.Twice(), SHAPE)) == 256 * 9 * (3 * 6 + 2 * 6 * 6) + 6 * 7


def mobilenet_parameters(widths):
    """Parameters of zoo.MobileNet, module by module: kernels, biases, and 2 per channel of batch norm."""
    e1, s1, e2, s2, out, head = widths

    def block(inputs, e, s, out):
        squeeze_excite = e * s + s + s * e + e
        return inputs * e + 2 * e + 9 * e + 2 * e + squeeze_excite + e * out + 2 * out

    stem, last = 27 * 8 + 8, out * head + head + 2 * head
    return stem + block(8, e1, s1, 8) + block(8, e2, s2, out) + last + head * 7 + 7


@settings(max_examples=40, deadline=None)
@given(st.tuples(*(st.integers(1, channels) for channels in zoo.MobileNet().channels)))
def test_parameters_are_what_one_counts_by_hand(widths):
    topology = trace_mobilenet()
    assert flops.parameters(topology, widths) == mobilenet_parameters(widths)
    value, slope = traced_parameters(topology, jnp.array(widths, jnp.float32))
    assert float(value) == pytest.approx(mobilenet_parameters(widths), rel=1e-6)
    more = [[w + (j == i) for j, w in enumerate(widths)] for i in range(6)]
    steps = [mobilenet_parameters(m) - mobilenet_parameters(widths) for m in more]
    np.testing.assert_allclose(slope, steps, rtol=1e-6)


def test_a_kernel_that_holds_one_gate_twice_grows_with_its_square():
    topology = trace(zoo.Twice(), SHAPE)
    for width in (1, 4, 6):
        first, shared, classifier = 27 * width + width, 9 * width**2 + width, 7 * width + 7
        assert flops.parameters(topology, [width]) == first + shared + classifier


@pytest.mark.parametrize(
    "model", [zoo.MobileNet(), zoo.VGG(), zoo.Multiplier()], ids=lambda model: type(model).__name__
)
def test_parameters_are_those_of_the_variables(model):
    params = zoo.randomized(model, SHAPE)["params"]
    assert flops.parameters(trace(model, SHAPE)) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_p_and_reduction():
    topology = trace_resnet20()
    share = 40_108_032 / 40_551_040  # stem: 442368, classifier: 640
    assert flops.p_for_reduction(topology, 0.5) == pytest.approx(1 - 0.5 / share, abs=1e-12)
    assert flops.reduction_for_p(topology, 0.48) == pytest.approx(0.52 * share, abs=1e-12)
    for convention in flops.CONVENTIONS:
        p = flops.p_for_reduction(topology, 0.62, convention)
        assert flops.reduction_for_p(topology, p, convention) == pytest.approx(0.62, abs=1e-12)
    assert flops.p_for_reduction(topology, 0.0) == 1


def test_bad_input_is_named():
    topology = trace_resnet20()
    with pytest.raises(ValueError, match=r"reduction 0\.99 cannot be met: .* less than 0\.9891"):
        flops.p_for_reduction(topology, 0.99)
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got 0"):
        flops.reduction_for_p(topology, 0)
    with pytest.raises(ValueError, match="convention 'flops' is unknown; use one of macs, authors"):
        flops.prunable(topology, None, "flops")
    for count in (flops.prunable, flops.total, flops.parameters):
        with pytest.raises(ValueError, match="3 widths were given; the network has 9 gates"):
            count(topology, (1, 2, 3))


def test_integer_widths_give_integers_and_others_float32():
    topology = trace_resnet20()
    assert type(flops.prunable(topology, np.array(topology.widths))) is int
    assert flops.prunable(topology, jnp.array(topology.widths)) == flops.prunable(topology)
    fractional = flops.prunable(topology, [w / 2 for w in topology.widths])
    assert (fractional.dtype, float(fractional)) == (jnp.float32, 40_108_032 / 2)


def test_resizing_an_image_is_no_layer():
    class Upsampled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="a")(x))
            x = jax.image.resize(x, (x.shape[0], 16, 16, x.shape[-1]), "bilinear")
            return nn.Dense(10, name="classifier")(nn.Conv(6, (3, 3), name="b")(x).mean((1, 2)))

    topology = trace(Upsampled(), (8, 8, 3))
    assert flops.total(topology) == 64 * 27 * 8 + 256 * 72 * 6 + 60 == 124_476
    assert [layer.name for layer in topology.layers] == ["a", "b", "classifier"]
    assert topology.widths == (8, 6)
    assert flops.total(topology, (4, 6)) == 64 * 27 * 4 + 256 * 36 * 6 + 60


def test_a_transposed_convolution_counts_at_its_input():
    class Transposed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.ConvTranspose(16, (2, 2), (2, 2))(x)

    assert flops.total(trace(Transposed(), (8, 8, 8))) == 64 * 2 * 2 * 8 * 16 == 32_768


def test_a_concatenation_counts_the_channels_of_every_part():
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i, features in enumerate((4, 5, 6)):
                x = jnp.concatenate([x, nn.relu(nn.Conv(features, (3, 3), name=f"conv{i}")(x))], -1)
            return nn.Dense(7, name="classifier")(x.mean((1, 2)))

    topology = trace(Dense(), (4, 4, 3))
    assert topology.widths == (4, 5, 6)

    def macs(a, b, c):
        return 16 * 9 * (3 * a + (3 + a) * b + (3 + a + b) * c) + (3 + a + b + c) * 7

    def parameters(a, b, c):
        return 9 * (3 * a + (3 + a) * b + (3 + a + b) * c) + a + b + c + (3 + a + b + c) * 7 + 7

    for widths in ((4, 5, 6), (1, 2, 3), (4, 1, 5)):
        assert flops.total(topology, widths) == macs(*widths)
        assert flops.parameters(topology, widths) == parameters(*widths)
    slope = jax.grad(lambda w: flops.prunable(topology, w))(jnp.array([2.0, 3.0, 4.0]))
    assert float(slope[0]) == macs(3, 3, 4) - macs(2, 3, 4)


def test_grouped_convolutions_and_group_norm_cost_by_whole_groups():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (1, 1), name="reduce")(x)))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x))
            return nn.Dense(7, name="classifier")(x.mean((1, 2)))

    topology = trace(Grouped(), (4, 4, 3))
    assert topology.widths == (4,)
    assert "0  reduce: 4 groups of 4 channels, read by classifier" in topology.describe()
    for groups in (1, 2, 4):
        reduce, grouped, classifier = 16 * 3 * 4 * groups, 16 * 9 * 4 * 2 * groups, 2 * groups * 7
        assert flops.total(topology, (groups,)) == reduce + grouped + classifier
