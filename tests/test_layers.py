"""Depthwise convolution: one function with two implementations, selected by the platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ddnp_jax.models.layers import depthwise_conv
from ddnp_jax.topology import trace

ARGUMENTS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def case(seed, size=(9, 7), channels=5, kernel=(3, 3)):
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(2, *size, channels)), rng.normal(size=(*kernel, 1, channels))
    return x.astype(np.float32), kernel.astype(np.float32)


def native(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, feature_group_count=x.shape[-1], **ARGUMENTS)


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "padding"),
    [
        ((9, 7), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((8, 9), (5, 5), (2, 2), ((2, 2), (2, 2))),
        ((6, 9), (3, 5), (2, 1), ((0, 1), (2, 0))),
        ((8, 8), (3, 3), (2, 2), "SAME"),
    ],
)
def test_both_forms_agree_in_values_and_gradients(size, kernel, strides, padding):
    x, kernel = case(0, size, 3, kernel)
    weights = np.arange(1, 4, dtype=np.float32).reshape(1, 1, 1, 3)

    def values_and_gradients(conv):
        def loss(x, kernel):
            y = conv(x, kernel, strides, padding, feature_group_count=3, **ARGUMENTS)
            return jnp.sum(y**2 * weights), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

    expected = values_and_gradients(jax.lax.conv_general_dilated)
    ours = values_and_gradients(depthwise_conv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), ours, expected)


def test_a_gradient_keeps_the_images_and_not_their_shifted_copies():
    x, kernel = case(3, (16, 16), 8)
    padding = ((1, 1), (1, 1))

    def conv(x, kernel):
        return depthwise_conv(x, kernel, (1, 1), padding, feature_group_count=8, **ARGUMENTS)

    kept = jax.tree.leaves(jax.jit(lambda *arguments: jax.vjp(conv, *arguments)[1])(x, kernel))
    assert x.size <= sum(each.size for each in kept) < 3 * x.size  # copies would be nine times as many


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_the_platform_decides(platform, convolutions):
    x, kernel = case(1)
    conv = nn.Conv(5, (3, 3), feature_group_count=5, use_bias=False, conv_general_dilated=depthwise_conv)
    apply = jax.jit(lambda kernel, x: conv.apply({"params": {"kernel": kernel}}, x))
    text = apply.trace(kernel, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


def test_bfloat16_is_summed_in_float32():
    x, kernel = (a.astype(jnp.bfloat16) for a in case(2, kernel=(5, 5)))
    y = depthwise_conv(x, kernel, (1, 1), ((2, 2), (2, 2)), feature_group_count=5, **ARGUMENTS)
    expected = native(x.astype(np.float32), kernel.astype(np.float32), (1, 1), ((2, 2), (2, 2)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))


def test_the_tracer_counts_the_layer_once():
    class Separable(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (1, 1), name="expand")(x)
            x = nn.Conv(6, (3, 3), 2, feature_group_count=6, conv_general_dilated=depthwise_conv, name="depthwise")(x)
            return nn.Dense(4, name="classifier")(x.mean((1, 2)))

    topology = trace(Separable(), (8, 8, 3))
    assert [(gate.name, gate.channels) for gate in topology.gates] == [("expand", 6)]
    layers = [
        (layer.name, layer.groups, layer.positions, layer.inputs.gates, layer.outputs.gates)
        for layer in topology.layers
    ]
    assert layers == [
        ("expand", 1, 64, (), (0,)),
        ("depthwise", 6, 16, (), (0,)),
        ("classifier", 1, 1, (0,), ()),
    ]


@pytest.mark.parametrize(
    ("kernel", "arguments"), [((3, 3, 1, 10), {}), ((3, 3, 5, 5), {}), ((3, 3, 1, 5), {"rhs_dilation": (2, 1)})]
)
def test_what_is_not_depthwise_is_refused(kernel, arguments):
    with pytest.raises(ValueError, match=r"depthwise_conv needs an undilated kernel \(h, w, 1, 5\), got"):
        depthwise_conv(jnp.ones((1, 8, 8, 5)), jnp.ones(kernel), (1, 1), ((1, 1), (1, 1)), **arguments)
