"""Fast convolutions on a CPU: equal to PyTorch's and to JAX's, and used where they are meant to be."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ddnp_jax import cpu, training
from ddnp_jax.convolutions import kernel_gradient, packed_convolution, with_fast_convolutions
from ddnp_jax.networks import as_network

rng = np.random.default_rng(0)


def drawn(*shape):
    return rng.normal(size=shape).astype(np.float32)


def conv(x, kernel, stride=1, padding="SAME", **arguments):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **arguments
    )


@pytest.mark.parametrize(
    ("images", "map_size", "channels", "size", "padding"),
    [
        (6, (32, 32), (3, 5), (3, 3), ((1, 1), (1, 1))),  # one image at a time
        (6, (9, 7), (4, 6), (3, 3), ((1, 1), (1, 1))),  # all images in one product
        (12, (12, 12), (5, 2), (3, 3), ((0, 0), (2, 1))),  # two images at a time
        (7, (16, 17), (2, 3), (5, 3), ((0, 2), (3, 0))),  # a number of images that has no divisor
        (4, (8, 8), (3, 90), (1, 1), ((0, 0), (0, 0))),
        (4, (8, 8), (3, 4), (1, 1), ((1, 0), (0, 2))),
        (2, (6, 5), (1, 1), (1, 5), ((0, 0), (2, 2))),
        (2, (5, 6), (2, 3), (5, 6), ((0, 0), (0, 0))),  # one pixel remains
        (1, (16, 16), (3, 3), (3, 3), ((1, 1), (1, 1))),
    ],
)
def test_gradient_of_a_kernel_against_pytorch(images, map_size, channels, size, padding):
    x = drawn(images, *map_size, channels[0])
    (top, bottom), (left, right) = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    out = [padded.shape[i + 1] - size[i] + 1 for i in (0, 1)]
    gradient = drawn(images, *out, channels[1])
    expected = torch.nn.grad.conv2d_weight(
        torch.tensor(padded.transpose(0, 3, 1, 2)).double(),
        (channels[1], channels[0], *size),
        torch.tensor(gradient.transpose(0, 3, 1, 2)).double(),
    )
    found = kernel_gradient(x, gradient, size, padding)
    np.testing.assert_allclose(found, expected.numpy().transpose(2, 3, 1, 0), rtol=1e-4, atol=2e-5 * np.sqrt(x.size))


@pytest.mark.parametrize(
    ("map_size", "channels", "size", "padding"),
    [
        ((5, 8), (3, 4), (3, 3), ((1, 1), (1, 1))),
        ((4, 6), (16, 1), (5, 5), ((2, 2), (2, 2))),
        ((6, 5), (2, 7), (1, 4), ((0, 0), (0, 0))),  # two columns remain
        ((3, 8), (1, 2), (3, 6), ((0, 2), (5, 0))),
        ((4, 7), (5, 5), (3, 3), ((1, 1), (0, 3))),
    ],
)
def test_a_convolution_of_packed_columns_against_pytorch(map_size, channels, size, padding):
    x, kernel = drawn(3, *map_size, channels[0]), drawn(*size, *channels)
    (top, bottom), (left, right) = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))).transpose(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(torch.tensor(padded), torch.tensor(kernel.transpose(3, 2, 0, 1)))
    found = packed_convolution(x, kernel, padding)
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


@jax.custom_vjp
def doubled(x, kernel):
    """A convolution whose kernel's gradient is twice the true one."""
    return conv(x, kernel)


def _doubled_backward(saved, gradient):
    of_x, of_kernel = jax.vjp(conv, *saved)[1](gradient)
    return of_x, 2 * of_kernel


doubled.defvjp(lambda x, kernel: (conv(x, kernel), (x, kernel)), _doubled_backward)


def network(kernels, x):
    """Every kind of convolution: covered ones plain, inside jit and checkpoint; and those that are left as they are."""
    x = jax.nn.relu(conv(x, kernels["plain"]))
    x = jax.jit(conv)(x, kernels["jit"]) + jax.checkpoint(conv)(x, kernels["checkpoint"])
    x = jax.nn.relu(conv(x, kernels["strided"], stride=2))
    x = conv(x, kernels["grouped"], feature_group_count=2)
    x = conv(x, kernels["dilated"], rhs_dilation=(2, 2))
    x = jnp.tanh(conv(x, kernels["pointwise"], padding="VALID"))
    x, _ = lax.scan(lambda carry, _: (conv(carry, kernels["loop"]), None), x, length=2)
    x = conv(x.astype(jnp.bfloat16), kernels["half"].astype(jnp.bfloat16)).astype(jnp.float32)
    x = doubled(x, kernels["own"])
    return jnp.sum(jnp.sin(x.mean((1, 2)) @ kernels["dense"]))


def kernels():
    shapes = {
        "plain": (3, 3, 3, 4),
        "jit": (3, 3, 4, 6),
        "checkpoint": (5, 5, 4, 6),
        "strided": (3, 3, 6, 4),
        "grouped": (3, 3, 2, 4),
        "dilated": (3, 3, 4, 4),
        "pointwise": (1, 1, 4, 4),
        "loop": (3, 3, 4, 4),
        "half": (3, 3, 4, 4),
        "own": (3, 3, 4, 4),
        "dense": (4, 5),
    }
    return {name: 0.3 * drawn(*shape) for name, shape in shapes.items()}


@pytest.fixture(params=[True, False], ids=["AVX-512", "no AVX-512"])
def avx512(request, monkeypatch):
    monkeypatch.setattr(cpu, "has_avx512", lambda: request.param)
    return request.param


def test_a_network_has_the_same_value_and_gradient(avx512):
    weights, x = kernels(), drawn(4, 12, 12, 3)
    value, expected = jax.jit(jax.value_and_grad(network, (0, 1)))(weights, x)
    same, found = jax.jit(jax.value_and_grad(with_fast_convolutions(network), (0, 1)))(weights, x)
    np.testing.assert_allclose(same, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_columns_are_packed_where_channels_are_few(avx512):
    def convolutions(size, *channels, stride=1):
        weights, x = drawn(*size, *channels), drawn(2, 8, 8, channels[0])
        function = with_fast_convolutions(lambda x, kernel: jnp.sin(conv(x, kernel, stride)).sum())
        text = jax.jit(jax.grad(function)).lower(x, weights).as_text()
        return re.findall(r"stablehlo.convolution\(.*tensor<(\w+)xf32>\) -> tensor<(\w+)xf32>", text)

    packed = [("3x2x6x32", "2x8x4x32"), ("3x2x32x6", "2x8x4x6")]  # the output and the gradient of the input
    assert convolutions((3, 3), 3, 16) == (packed if avx512 else [("3x3x3x16", "2x8x8x16"), ("3x3x3x16", "2x8x8x3")])
    assert convolutions((3, 3), 16, 16) == [("3x3x16x16", "2x8x8x16"), ("3x3x16x16", "2x8x8x16")]
    assert convolutions((3, 3), 3, 17) == [("3x3x3x17", "2x8x8x17"), ("3x3x3x17", "2x8x8x3")]
    assert convolutions((1, 1), 3, 4) == [("1x1x3x4", "2x8x8x4"), ("1x1x3x4", "2x8x8x3")]
    assert convolutions((3, 3), 3, 4, stride=2)[0] == ("3x3x3x4", "2x4x4x4")


def test_gradients_in_shard_map(avx512):
    """With JAX's check of what varies over devices, which the library's own steps do not use."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x, kernel = drawn(4, 16, 16, 3), drawn(3, 3, 3, 5)

    def gradients(function):
        mapped = jax.shard_map(jax.grad(function, (0, 1)), mesh=mesh, in_specs=(P("d"), P()), out_specs=(P("d"), P()))
        return jax.jit(mapped)(x, kernel)

    def loss(x, kernel):
        return jnp.sin(conv(x, kernel)).sum()

    for found, expected in zip(gradients(with_fast_convolutions(loss)), gradients(loss), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_arrays_without_elements(avx512):
    gradient = jax.grad(with_fast_convolutions(lambda x, kernel: conv(x, kernel).sum()), (0, 1))
    of_x, of_kernel = gradient(drawn(0, 8, 8, 3), drawn(3, 3, 3, 4))
    assert of_x.shape == (0, 8, 8, 3)
    np.testing.assert_array_equal(of_kernel, np.zeros((3, 3, 3, 4)))
    no_column = with_fast_convolutions(lambda x, kernel: conv(x, kernel, padding="VALID"))
    assert no_column(drawn(2, 8, 1, 3), drawn(3, 3, 3, 4)).shape == (2, 6, 0, 4)


def test_only_covered_convolutions_have_another_gradient():
    weights, x = kernels(), drawn(4, 12, 12, 3)

    def convolutions(function):
        return jax.jit(jax.grad(function)).lower(weights, x).as_text().count("stablehlo.convolution(")

    # The four covered ones have no convolution for their kernel's gradient: plain, jit, checkpoint and pointwise.
    assert convolutions(network) - convolutions(with_fast_convolutions(network)) == 4


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(5, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x))).mean((1, 2))


def test_training_computes_the_gradients_of_kernels_in_this_form():
    network, optimizer, x = as_network(TwoLayers()), optax.sgd(0.1), drawn(4, 12, 12, 3)
    state = training.init_state(network, TwoLayers().init(jax.random.key(0), x), optimizer)
    step = jax.jit(training.train_step(network, optimizer))
    text = step.lower(state, None, (x, np.zeros(4, np.int32)), jax.random.key(0)).as_text()
    assert text.count("stablehlo.convolution(") == 3  # two outputs and the gradient of the second layer's input
