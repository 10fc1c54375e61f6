"""Flax models that are not part of the library and were written without pruning in mind.

Each one takes its inner channel counts as an attribute, so that a test can build the smaller network; none of the
attributes is called `widths`, so that the library has to ask for it (`rebuild`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class VGG(nn.Module):
    """Convolutions with biases, max pooling, a flatten of (H, W, C), two dense layers."""

    features: tuple = (6, 8, 10, 12)

    @nn.compact
    def __call__(self, x, train=False):
        for i, features in enumerate(self.features[:-1]):
            x = nn.Conv(features, (3, 3), name=f"features_{i}")(x)
            x = nn.leaky_relu(nn.BatchNorm(use_running_average=not train, name=f"norm_{i}")(x))
            if i > 0:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = jnp.tanh(nn.Dense(self.features[-1], name="hidden")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(7, name="classifier")(x)


class SqueezeExcite(nn.Module):
    squeezed: int

    @nn.compact
    def __call__(self, x):
        s = x.mean((1, 2), keepdims=True)
        s = nn.relu(nn.Conv(self.squeezed, (1, 1), name="squeeze")(s))
        return x * nn.hard_sigmoid(nn.Conv(x.shape[-1], (1, 1), name="excite")(s))


class InvertedResidual(nn.Module):
    expanded: int
    squeezed: int
    out: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, name=name)

        y = nn.hard_swish(norm("bn1")(nn.Conv(self.expanded, (1, 1), use_bias=False, name="expand")(x)))
        y = nn.Conv(
            self.expanded, (3, 3), self.stride, feature_group_count=self.expanded, use_bias=False, name="depthwise"
        )(y)
        y = nn.hard_swish(SqueezeExcite(self.squeezed, name="se")(norm("bn2")(y)))
        y = norm("bn3")(nn.Conv(self.out, (1, 1), use_bias=False, name="project")(y))
        return x + y if self.stride == 1 else y


class MobileNet(nn.Module):
    """Two inverted residual blocks with squeeze-excite, the second one with stride 2 and rematerialized."""

    channels: tuple = (12, 4, 16, 5, 10, 14)

    @nn.compact
    def __call__(self, x, train=False):
        first, first_se, second, second_se, out, head = self.channels
        x = nn.gelu(nn.Conv(8, (3, 3), 2, name="stem")(x))
        x = InvertedResidual(first, first_se, 8, 1, name="block1")(x, train)
        x = nn.remat(InvertedResidual, static_argnums=(2,))(second, second_se, out, 2, name="block2")(x, train)
        x = nn.silu(nn.BatchNorm(use_running_average=not train)(nn.Conv(head, (1, 1), name="head")(x)))
        return nn.Dense(7, name="classifier")(nn.avg_pool(x, x.shape[1:3]).squeeze((1, 2)))


class PreActBottleneck(nn.Module):
    """setup() style, pre-activation, with a projection where the shape changes."""

    inner: tuple
    out: int
    stride: int = 1
    project: bool = False

    def setup(self):
        self.norms = [nn.BatchNorm(epsilon=1e-3) for _ in range(3)]
        self.reduce = nn.Conv(self.inner[0], (1, 1), use_bias=False)
        self.spatial = nn.Conv(self.inner[1], (3, 3), self.stride, padding=((1, 1), (1, 1)), use_bias=False)
        self.widen = nn.Conv(self.out, (1, 1))
        if self.project:
            self.shortcut = nn.Conv(self.out, (1, 1), self.stride)

    def activate(self, i, x):
        return nn.elu(self.norms[i](x, use_running_average=True))

    def __call__(self, x):
        y = self.activate(0, x)
        skip = self.shortcut(y) if self.project else x
        y = self.activate(1, self.reduce(y))
        return skip + self.widen(self.activate(2, self.spatial(y)))


class PreActResNet(nn.Module):
    inner: tuple = ((4, 5), (6, 7), (8, 9))
    outer: tuple = (8, 16)

    def setup(self):
        first, second = self.outer
        self.stem = nn.Conv(first, (3, 3), use_bias=False)
        self.stages = [
            PreActBottleneck(self.inner[0], first),
            PreActBottleneck(self.inner[1], second, 2, project=True),
            PreActBottleneck(self.inner[2], second),
        ]
        self.top = nn.Dense(7)

    def __call__(self, images):
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.top(nn.relu(x).mean(axis=(1, 2)))


class Sorted(nn.Module):
    """Sorts the channels of its second convolution, which the tracer of channels cannot follow."""

    features: tuple = (6, 9)

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.features[0], (3, 3), name="first")(x))
        x = jnp.sort(nn.Conv(8, (3, 3), name="second")(x), axis=-1)
        x = nn.Conv(self.features[1], (3, 3), name="third")(x)
        return nn.Dense(7, name="classifier")(x.mean((1, 2)))


class Twice(nn.Module):
    """One convolution called twice between two others, so that its input and output must keep the same channels."""

    features: tuple = (6,)

    @nn.compact
    def __call__(self, x):
        shared = nn.Conv(self.features[0], (3, 3), name="shared")
        x = nn.relu(nn.Conv(self.features[0], (3, 3), name="first")(x))
        x = nn.relu(shared(nn.relu(shared(x))))
        return nn.Dense(7, name="classifier")(x.max((1, 2)))


class Multiplier(nn.Module):
    """A depthwise convolution with two outputs per channel, then a flatten of (C, H, W)."""

    features: tuple = (6,)

    @nn.compact
    def __call__(self, x):
        n = self.features[0]
        x = nn.relu(nn.Conv(n, (3, 3), (2, 2), name="first")(x))
        x = nn.relu(nn.Conv(2 * n, (3, 3), (2, 2), feature_group_count=n, name="depthwise")(x))
        return nn.Dense(7, name="classifier")(jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1))


class OwnKernel(nn.Module):
    """A module that contracts `kernel_map` of a parameter of its own with `before` of its input."""

    features: int
    before: Any = staticmethod(lambda x: x)
    kernel_map: Any = staticmethod(lambda kernel: kernel)

    @nn.compact
    def __call__(self, x):
        x = self.before(x)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x @ self.kernel_map(kernel)


class OwnKernelAndDense(nn.Module):
    """A module whose own kernel and dense layer both read its input, so that the input would be masked twice."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 5))
        return (x @ kernel) * nn.Dense(5)(x)


class OwnKernels(nn.Module):
    """A group that is read by a module's own kernel, after zeros were added in space, and by a depthwise product."""

    features: tuple = (6, 5)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features[0], (3, 3), name="conv")(x)
        scale = self.param("scale", nn.initializers.ones, (3, self.features[0]))
        x = nn.silu(sum(x[:, i : i + 6] * scale[i].reshape(1, 1, 1, -1) for i in range(3)))
        x = OwnKernel(self.features[1], lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0))), name="own")(x)
        return nn.Dense(7, name="classifier")(nn.sigmoid(x).mean((1, 2)))


class ShiftedDense(nn.Dense):
    """A dense layer that changes its input before it reads it."""

    def __call__(self, x):
        return super().__call__(x + 1)


class HandedOn(nn.Dense):
    """A dense layer whose input passes through two `__call__`s of the same module."""

    def __call__(self, x):
        return super().__call__(x)


def two_layouts(x):
    """One dense layer that reads the same channels from the last axis of four and of two."""
    dense = nn.Dense(5)
    return dense(x).mean((1, 2)) * dense(x.mean((1, 2)))


def over_rows(x):
    """One dense layer mapped over the rows of the image."""
    rows = nn.vmap(nn.Dense, in_axes=1, out_axes=1, variable_axes={"params": None}, split_rngs={"params": False})
    return rows(5)(x).mean((1, 2))


def blur(x):
    """A fixed 3x3 box filter for every channel."""
    kernel = jnp.broadcast_to(jnp.ones((3, 3, 1, 1)) / 9, (3, 3, 1, x.shape[-1]))
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


class Standardized(nn.Module):
    """A convolution whose kernel is standardized over all but its output channels."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], 5))
        kernel = (kernel - kernel.mean((0, 1, 2), keepdims=True)) / kernel.std((0, 1, 2), keepdims=True)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def standardized(x):
    """A convolution with weight standardization."""
    return Standardized()(x)


class TwoKernels(nn.Module):
    """A dense layer whose kernel is the elementwise product of two parameters."""

    @nn.compact
    def __call__(self, x):
        n = x.shape[-1]
        first = self.param("first", nn.initializers.lecun_normal(), (n, n))
        second = self.param("second", nn.initializers.lecun_normal(), (n, n))
        return x @ (first * second)


def two_kernels(x):
    """A layer with two stored kernels instead of one."""
    return TwoKernels()(x)


def outer(x, y):
    """All products of two kinds of channels, on one axis."""
    return (x[:, :, None] * y[:, None, :]).reshape(x.shape[0], -1)


def grouped(x):
    """A convolution in two groups."""
    return nn.Conv(6, (3, 3), feature_group_count=2)(x).mean((1, 2))


class Middle(nn.Module):
    """conv -> `middle` -> dense: `middle` decides whether the convolution is a gate."""

    middle: Any
    features: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), name="conv")(x)
        return nn.Dense(7, name="classifier")(self.middle(x))


class Stacked(nn.Module):
    """Layers inside a scan."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return nn.relu(nn.Dense(5)(carry)), None

        x, _ = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(
            nn.Dense(5)(x.mean((1, 2))), None
        )
        return nn.Dense(7)(x)


def randomized(model, shape, seed=0, **kwargs):
    """Variables whose every leaf is random, so that biases and means behind removed channels matter."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), **kwargs))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1], dtype=np.float32)
        kernel = values * np.sqrt(20 / fan_in)  # activations keep their size, so that none of them saturates
        return {"var": abs(values) + 0.5, "scale": values + 1, "kernel": kernel}.get(path[-1].key, values)

    return jax.tree.map_with_path(draw, variables)
