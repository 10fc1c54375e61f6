"""Networks written without this library in mind: their widths are shared by a stage and cannot be set per layer.

Each network has the characteristic parts of a published family of networks, in a small size. `NETWORKS` contains how to
build each of them, and what must be found removable.
"""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta

# ---- residual networks, linen


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a projection where the shapes differ. Layers come from the caller's partials."""

    features: int
    conv: Any
    norm: Any
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        shortcut = x
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.features, (3, 3))(y))
        if shortcut.shape != y.shape:
            shortcut = self.conv(self.features, (1, 1), self.strides, name="project")(shortcut)
            shortcut = self.norm(name="project_norm")(shortcut)
        return nn.relu(shortcut + y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 in `groups` groups, 1x1 to four times the features."""

    features: int
    conv: Any
    norm: Any
    strides: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        shortcut = x
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = self.conv(self.features, (3, 3), self.strides, feature_group_count=self.groups)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(self.features * 4, (1, 1))(y))
        if shortcut.shape != y.shape:
            shortcut = self.conv(self.features * 4, (1, 1), self.strides, name="project")(shortcut)
            shortcut = self.norm(name="project_norm")(shortcut)
        return nn.relu(shortcut + y)


class ResNet(nn.Module):
    """Stem, stages of `block`, mean, classifier. With `axis_name` batch norm averages over a mapped axis."""

    block: Any = BasicBlock
    stages: tuple = (1, 2)
    width: int = 8
    classes: int = 7
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name
        )
        x = nn.relu(norm(name="stem_norm")(conv(self.width, (3, 3), name="stem")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = self.block(self.width * 2**i, conv, norm, strides=2 if i > 0 and j == 0 else 1)(x)
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


class GroupNormResNet(nn.Module):
    """The same blocks over group norm, without a mode."""

    groups: int = 4

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.GroupNorm, num_groups=self.groups)
        x = nn.relu(norm()(conv(8, (3, 3))(x)))
        x = BasicBlock(8, conv, norm)(x)
        x = BasicBlock(16, conv, norm, strides=2)(x)
        return nn.Dense(7)(x.mean((1, 2)))


class WideBlock(nn.Module):
    """Pre-activation, with dropout between its convolutions; a projection reads the activation."""

    features: int
    strides: int
    dropout: float

    @nn.compact
    def __call__(self, x, train):
        same = x.shape[-1] == self.features and self.strides == 1
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_1")(x))
        shortcut = x if same else nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="conv_shortcut")(y)
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False, name="conv_1")(y)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_2")(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return shortcut + nn.Conv(self.features, (3, 3), use_bias=False, name="conv_2")(y)


class WideResNet(nn.Module):
    blocks_per_stage: int = 1
    widen: int = 2
    classes: int = 7

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="init_conv")(x)
        for i, width in enumerate((4, 8)):
            for j in range(self.blocks_per_stage):
                strides = 2 if i and not j else 1
                x = WideBlock(width * self.widen, strides, 0.3, name=f"stage{i}_block{j}")(x, train)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="final_bn")(x))
        x = nn.avg_pool(x, (8, 8), strides=(8, 8))
        return nn.Dense(self.classes, name="head")(x.reshape((x.shape[0], -1)))


class StandardizedConv(nn.Conv):
    """A convolution whose kernel is standardized to mean 0 and variance 1 per output channel before it is used."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        value = value - jnp.mean(value, axis=(0, 1, 2))
        return value / (jnp.std(value, axis=(0, 1, 2)) + 1e-5)


class BigTransferUnit(nn.Module):
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(StandardizedConv, use_bias=False)
        y = nn.relu(nn.GroupNorm(4, name="gn1")(x))
        if x.shape[-1] != self.features * 4 or self.strides != 1:
            x = conv(self.features * 4, (1, 1), self.strides, name="conv_proj")(y)
        y = conv(self.features, (1, 1), name="conv1")(y)
        y = conv(self.features, (3, 3), self.strides, name="conv2")(nn.relu(nn.GroupNorm(4, name="gn2")(y)))
        return x + conv(self.features * 4, (1, 1), name="conv3")(nn.relu(nn.GroupNorm(4, name="gn3")(y)))


class BigTransfer(nn.Module):
    """Pre-activation residual network with standardized kernels and group norm; it has two outputs."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train  # there is nothing that differs
        parts = {}
        x = StandardizedConv(8, (3, 3), use_bias=False, name="root")(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = BigTransferUnit(4, name="unit1")(x)
        x = parts["unit2"] = BigTransferUnit(8, 2, name="unit2")(x)
        x = nn.relu(nn.GroupNorm(4, name="gn")(x))
        parts["logits"] = nn.Dense(7, kernel_init=nn.initializers.zeros, name="head")(x.mean((1, 2)))
        return parts["logits"], parts


# ---- without shortcuts, linen


class VGG(nn.Module):
    """Configuration as a tuple of widths and "M" for a pooling, batch norm, a flatten, two hidden layers."""

    layers: tuple = (6, "M", 8, 8, "M")

    @nn.compact
    def __call__(self, x, train: bool = True):
        for each in self.layers:
            if each == "M":
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            else:
                x = nn.Conv(each, (3, 3), padding=1)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(10)(x)))
        return nn.Dense(7)(x)


class DepthwiseSeparable(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x, is_training):
        norm = functools.partial(nn.BatchNorm, use_running_average=not is_training)
        x = nn.Conv(x.shape[-1], (3, 3), self.strides, feature_group_count=x.shape[-1], use_bias=False, name="dw")(x)
        x = nn.relu6(norm(name="dw_bn")(x))
        x = nn.Conv(self.features, (1, 1), use_bias=False, name="pw")(x)
        return nn.relu6(norm(name="pw_bn")(x))


class MobileNetV1(nn.Module):
    multiplier: float = 0.25

    @nn.compact
    def __call__(self, x, is_training: bool = False):
        def scaled(n):
            return max(1, int(n * self.multiplier))

        x = nn.Conv(scaled(24), (3, 3), 2, use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=not is_training, name="stem_bn")(x))
        for i, (features, strides) in enumerate(((32, 1), (48, 2), (48, 1))):
            x = DepthwiseSeparable(scaled(features), strides, name=f"block{i}")(x, is_training)
        return nn.Dense(7, name="logits")(x.mean(axis=(1, 2)))


# ---- concatenation, linen


class DenseLayer(nn.Module):
    growth: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm1")(x))
        y = nn.Conv(4 * self.growth, (1, 1), use_bias=False, name="conv1")(y)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm2")(y))
        return jnp.concatenate([x, nn.Conv(self.growth, (3, 3), use_bias=False, name="conv2")(y)], axis=-1)


class DenseNet(nn.Module):
    growth: int = 4

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(2 * self.growth, (3, 3), use_bias=False, name="conv0")(x)
        for i, layers in enumerate((2, 2)):
            for j in range(layers):
                x = DenseLayer(self.growth, name=f"block{i}_layer{j}")(x, train)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
            if i == 0:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False, name="transition")(x)
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(7, name="classifier")(x.mean((1, 2)))


class UNet(nn.Module):
    """Two levels; upsampling by a transposed convolution or by `jax.image.resize` and a convolution."""

    transposed: bool = True
    classes: int = 3

    @nn.compact
    def __call__(self, x, train: bool = False):
        def double(x, features, name):
            for i in range(2):
                x = nn.Conv(features, (3, 3), name=f"{name}_conv{i}")(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{name}_bn{i}")(x))
            return x

        skips = []
        for i, features in enumerate((6, 8)):
            x = double(x, features, f"down{i}")
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = double(x, 12, "bottom")
        for i, features in reversed(list(enumerate((6, 8)))):
            if self.transposed:
                x = nn.ConvTranspose(features, (2, 2), (2, 2), name=f"up{i}")(x)
            else:
                n, h, w, c = x.shape
                x = jax.image.resize(x, (n, 2 * h, 2 * w, c), "bilinear")
                x = nn.Conv(features, (3, 3), name=f"up{i}")(x)
            x = double(jnp.concatenate([skips[i], x], axis=-1), features, f"merge{i}")
        return nn.Conv(self.classes, (1, 1), name="out")(x)


# ---- squeeze and excitation, stochastic depth, layer scale, linen


class SqueezeExcite(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = nn.silu(nn.Conv(self.features, (1, 1), name="reduce")(s))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name="expand")(s))


class DropPath(nn.Module):
    """Drops the whole residual branch of an image at random, from a random stream of its own."""

    rate: float = 0.2

    @nn.compact
    def __call__(self, x, deterministic: bool):
        if deterministic or self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return x * keep / (1 - self.rate)


class YBlock(nn.Module):
    features: int
    group_width: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        groups = self.features // self.group_width
        y = nn.relu(norm(name="bn1")(nn.Conv(self.features, (1, 1), use_bias=False, name="conv1")(x)))
        y = nn.Conv(
            self.features, (3, 3), self.strides, padding=1, feature_group_count=groups, use_bias=False, name="conv2"
        )(y)
        y = SqueezeExcite(x.shape[-1] // 2, name="se")(nn.relu(norm(name="bn2")(y)))
        y = norm(name="bn3")(nn.Conv(self.features, (1, 1), use_bias=False, name="conv3")(y))
        if x.shape != y.shape:
            x = norm(name="bn_short")(nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="short")(x))
        return nn.relu(x + y)


class RegNetY(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (3, 3), 2, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="stem_bn")(x))
        for i, (features, strides) in enumerate(((8, 1), (16, 2))):
            x = YBlock(features, 4, strides, name=f"block{i}")(x, train)
        return nn.Dense(7, name="fc")(x.mean((1, 2)))


class MBConv(nn.Module):
    features: int
    strides: int = 1
    expansion: int = 3

    @nn.compact
    def __call__(self, x, training):
        norm = functools.partial(nn.BatchNorm, use_running_average=not training, momentum=0.99, epsilon=1e-3)
        inner = x.shape[-1] * self.expansion
        y = nn.silu(norm(name="bn0")(nn.Conv(inner, (1, 1), use_bias=False, name="expand")(x)))
        y = nn.Conv(inner, (5, 5), self.strides, feature_group_count=inner, use_bias=False, name="depthwise")(y)
        y = SqueezeExcite(max(1, x.shape[-1] // 4), name="se")(nn.silu(norm(name="bn1")(y)))
        y = norm(name="bn2")(nn.Conv(self.features, (1, 1), use_bias=False, name="project")(y))
        if x.shape == y.shape:
            y = x + DropPath()(y, deterministic=not training)
        return y


class EfficientNet(nn.Module):
    """Inverted bottlenecks, of which the last has no shortcut, and a head with more channels."""

    @nn.compact
    def __call__(self, x, training: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not training)
        x = nn.silu(norm(name="stem_bn")(nn.Conv(6, (3, 3), 2, use_bias=False, name="stem")(x)))
        for i, (features, strides) in enumerate(((6, 1), (8, 2), (10, 2))):
            x = MBConv(features, strides, name=f"block{i}")(x, training)
        x = nn.silu(norm(name="head_bn")(nn.Conv(20, (1, 1), use_bias=False, name="head")(x)))
        x = nn.Dropout(0.2, deterministic=not training)(x.mean((1, 2)))
        return nn.Dense(7, name="classifier")(x)


class ConvNeXtBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, deterministic):
        y = nn.Conv(self.features, (7, 7), feature_group_count=self.features, name="dwconv")(x)
        y = nn.LayerNorm(epsilon=1e-6, name="norm")(y)
        y = nn.Dense(4 * self.features, name="pwconv1")(y)
        y = nn.Dense(self.features, name="pwconv2")(nn.gelu(y))
        y = y * self.param("gamma", nn.initializers.constant(1e-6), (self.features,))
        return x + DropPath()(y, deterministic)


class ConvNeXt(nn.Module):
    depths: tuple = (1, 2)
    dims: tuple = (6, 8)

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            if i == 0:
                x = nn.LayerNorm(name="stem_norm")(nn.Conv(dim, (4, 4), (4, 4), padding="VALID", name="stem")(x))
            else:
                x = nn.LayerNorm(name=f"down{i}_norm")(x)
                x = nn.Conv(dim, (2, 2), (2, 2), padding="VALID", name=f"down{i}")(x)
            for j in range(depth):
                x = ConvNeXtBlock(dim, name=f"stage{i}_block{j}")(x, deterministic)
        return nn.Dense(7, name="head")(nn.LayerNorm(name="norm")(x.mean((1, 2))))


# ---- habits of style, linen


class Swish(nn.Module):
    """An activation as a module; all networks share one instance."""

    def __call__(self, x):
        return x * jax.nn.sigmoid(x)


ACT = Swish()


class RunningAverages(nn.Module):
    """The call has the argument `use_running_average`, and the activations are a module-level instance."""

    @nn.compact
    def __call__(self, x, use_running_average: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=use_running_average)
        x = ACT(norm(name="bn1")(nn.Conv(6, (3, 3), name="conv1")(x)))
        x = ACT(norm(name="bn2")(nn.Conv(8, (3, 3), (2, 2), name="conv2")(x)))
        return nn.Dense(7, name="out")(jnp.max(x, axis=(1, 2)))


class ModeAttribute(nn.Module):
    """The mode is an attribute of the module, not an argument of its call."""

    deterministic: bool = True

    def setup(self):
        self.conv1 = nn.Conv(6, (3, 3))
        self.conv2 = nn.Conv(8, (3, 3), (2, 2))
        self.dropout = nn.Dropout(0.3, deterministic=self.deterministic)
        self.norm = nn.BatchNorm(use_running_average=self.deterministic)
        self.out = nn.Dense(7)

    def __call__(self, x):
        x = self.dropout(nn.relu(self.norm(self.conv1(x))))
        return self.out(nn.relu(self.conv2(x)).mean((1, 2)))


class Simple(nn.Module):
    """The first example of a tutorial: unnamed layers, pooling, a flatten, no mode."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(features=6, kernel_size=(3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(features=8, kernel_size=(3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(features=12)(x.reshape((x.shape[0], -1))))
        return nn.log_softmax(nn.Dense(features=7)(x))


class Partitioned(nn.Module):
    """Kernels with the names of the mesh axes over which they are to be divided."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        def init(*names):
            return nn.with_partitioning(nn.initializers.lecun_normal(), names)

        x = nn.Conv(6, (3, 3), kernel_init=init(None, None, None, "model"), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn1")(x))
        x = nn.relu(nn.Conv(8, (3, 3), (2, 2), kernel_init=init(None, None, None, "model"), name="conv2")(x))
        x = nn.relu(nn.Dense(10, kernel_init=init("model", None), name="hidden")(x.mean((1, 2))))
        return nn.Dense(7, kernel_init=init(None, "model"), name="out")(x)


class HalfPrecision(nn.Module):
    """Computes in bfloat16 with float32 parameters; nothing is called `dtype`. The output is a dictionary."""

    compute_dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = jnp.asarray(x, self.compute_dtype)
        for i, features in enumerate((6, 8, 10)):
            x = nn.Conv(features, (3, 3), (2, 2), dtype=self.compute_dtype, name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=not train, dtype=self.compute_dtype, name=f"bn{i}")(x)
            x = nn.relu(x)
        x = x.mean((1, 2))
        return {"features": x, "logits": nn.Dense(7, dtype=self.compute_dtype, name="out")(x).astype(jnp.float32)}


@flax.struct.dataclass
class Detections:
    scores: jax.Array
    boxes: jax.Array
    stride: int = flax.struct.field(pytree_node=False, default=4)


class Detector(nn.Module):
    """Two heads on one trunk, and a dataclass for their outputs."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i, features in enumerate((6, 8)):
            x = nn.Conv(features, (3, 3), (2, 2), name=f"trunk{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"trunk{i}_bn")(x))
        heads = {}
        for name, outputs in (("scores", 5), ("boxes", 4)):
            y = nn.relu(nn.Conv(7, (3, 3), name=f"{name}_hidden")(x))
            heads[name] = nn.Conv(outputs, (1, 1), name=name)(y)
        return Detections(**heads)


def blur_pool(x):
    """Halves the image after a binomial filter, which is the same for every channel and not a parameter."""
    line = np.array([1, 2, 1], np.float32) / 4
    kernel = jnp.tile(jnp.asarray(np.outer(line, line))[:, :, None, None], (1, 1, 1, x.shape[-1]))
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


class Blurred(nn.Module):
    """An antialiased pooling between a convolution and the gate of its own channels."""

    @nn.compact
    def __call__(self, x):
        x = blur_pool(nn.relu(nn.Conv(8, (3, 3), name="conv1")(x)))
        x = x * nn.sigmoid(nn.Conv(8, (1, 1), name="excite")(x.mean((1, 2), keepdims=True)))
        x = blur_pool(nn.relu(nn.Conv(10, (3, 3), name="conv2")(x)))
        return nn.Dense(7, name="out")(x.mean((1, 2)))


class NarrowPlaces(nn.Module):
    """An attention map of one channel, and a chain through a single channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv1")(x))
        x = x * nn.sigmoid(nn.Conv(1, (7, 7), name="attention")(x))
        x = nn.elu(nn.Conv(1, (3, 3), name="single")(x))
        x = nn.relu(nn.Conv(6, (3, 3), name="conv2")(x))
        return nn.Dense(7, name="out")(x.mean((1, 2)))


class Backbone(nn.Module):
    """A feature extractor without a classifier, with an inline identity in place of an attention module."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(6, (3, 3), (2, 2), name="conv1")(x)
        x = Identity()(nn.relu(nn.BatchNorm(use_running_average=not train, name="bn1")(x)))
        return nn.relu(nn.Conv(8, (3, 3), (2, 2), name="conv2")(x))


class Identity(nn.Module):
    def __call__(self, x):
        return x


class Classifier(nn.Module):
    """A module that is given as an attribute, with a head that is created in `setup`."""

    backbone: nn.Module
    classes: int = 7

    def setup(self):
        self.head = nn.Dense(self.classes)

    def __call__(self, x, train: bool = False):
        return self.head(self.backbone(x, train=train).mean((1, 2)))


def sequential():
    """A network without a class of its own."""
    pooled = functools.partial(jnp.mean, axis=(1, 2))
    return nn.Sequential([nn.Conv(6, (3, 3)), nn.relu, nn.Conv(8, (3, 3), (2, 2)), nn.relu, pooled, nn.Dense(7)])


class ShortcutWhereShapesAgree(nn.Module):
    """A network with a shortcut if two widths are equal, which pruning can cause."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv1")(x))
        y = nn.relu(nn.Conv(8, (3, 3), name="conv2")(x))
        if x.shape == y.shape:
            y = x + y
        return nn.Dense(7, name="out")(y.mean((1, 2)))


# ---- nnx


class NnxBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, strides: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv0 = conv(inputs, outputs, (3, 3), strides=strides, padding=1)
        self.bn0 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv1 = conv(outputs, outputs, (3, 3), padding=1)
        self.bn1 = nnx.BatchNorm(outputs, rngs=rngs)
        project = inputs != outputs or strides != 1
        self.downsample = (
            nnx.Sequential(conv(inputs, outputs, (1, 1), strides=strides), nnx.BatchNorm(outputs, rngs=rngs))
            if project
            else None
        )

    def __call__(self, x):
        y = self.bn1(self.conv1(jax.nn.relu(self.bn0(self.conv0(x)))))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class NnxResNet(nnx.Module):
    """Stages are lists of blocks, the stem a sequence that contains functions."""

    def __init__(self, stages: tuple[int, ...] = (1, 2), classes: int = 7, *, rngs: nnx.Rngs):
        self.stem = nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            jax.nn.relu,
            functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
        )
        blocks, inputs = [], 8
        for i, count in enumerate(stages):
            for j in range(count):
                blocks.append(NnxBlock(inputs, 8 * 2**i, 2 if i > 0 and j == 0 else 1, rngs=rngs))
                inputs = 8 * 2**i
        self.layers = nnx.List(blocks)
        self.fc = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.layers:
            x = block(x)
        return self.fc(x.mean(axis=(1, 2)))


class NnxMobileNet(nnx.Module):
    """Depthwise and grouped convolutions, group norm, dropout, a hidden dense layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.pointwise = nnx.Conv(8, 12, (1, 1), rngs=rngs)
        self.grouped = nnx.Conv(12, 12, (3, 3), feature_group_count=3, rngs=rngs)
        self.norm = nnx.GroupNorm(12, num_groups=3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.hidden = nnx.Linear(12, 10, rngs=rngs)
        self.head = nnx.Linear(10, 7, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = nnx.relu(self.pointwise(nnx.relu(self.depthwise(x))))
        x = nnx.silu(self.norm(self.grouped(x)))
        return self.head(self.dropout(nnx.relu(self.hidden(x.mean((1, 2))))))


# ---- functions


def plain_function(variables, images):
    """Convolutions and dense layers from a list of dictionaries, without any module."""
    x = images
    for layer in variables["convolutions"]:
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x * layer["scale"] + layer["bias"])
    x = x.mean((1, 2))
    for layer in variables["dense"]:
        x = jnp.tanh(x) @ layer["kernel"] + layer["bias"]
    return x


def plain_variables():
    def layer(*shape):
        return {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
            "bias": jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        }

    def convolution(i, o):
        return layer(3, 3, i, o) | {"scale": jax.ShapeDtypeStruct((o,), jnp.float32)}

    return {"convolutions": [convolution(3, 6), convolution(6, 8)], "dense": [layer(8, 10), layer(10, 7)]}


@functools.cache
def equinox_network():
    """An Equinox network as a function of its arrays: one image (C, H, W) at a time, mapped over the batch."""
    import equinox as eqx

    class Network(eqx.Module):
        layers: list
        norm: eqx.nn.BatchNorm
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.layers = [eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]), eqx.nn.Conv2d(6, 8, 3, 2, key=keys[1])]
            self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="ema")
            self.hidden = eqx.nn.Linear(8, 10, key=keys[2])
            self.out = eqx.nn.Linear(10, 7, key=keys[3])

        def __call__(self, x, state):
            x, state = self.norm(self.layers[0](x), state)
            x = jax.nn.relu(self.layers[1](jax.nn.relu(x)))
            return self.out(jax.nn.relu(self.hidden(x.mean((1, 2))))), state

    shapes = eqx.filter_eval_shape(eqx.nn.make_with_state(Network), jax.random.key(0))
    network, state = jax.tree.map(_zeros, shapes)
    network = {"network": eqx.nn.inference_mode(network), "state": state}
    arrays, rest = eqx.partition(network, eqx.is_inexact_array)

    def equinox_function(variables, images):
        both = eqx.combine(variables, rest)
        network = jax.vmap(both["network"], axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return network(jnp.transpose(images, (0, 3, 1, 2)), both["state"])[0]

    return equinox_function, arrays


@functools.cache
def haiku_network():
    """A Haiku network as a function of parameters and state.

    Haiku compares every parameter with the shape that the code asks for. An interceptor lets the sizes of the layers
    follow their parameters, so that the function takes smaller ones.
    """
    import haiku as hk

    def follow(method, args, kwargs, context):
        if context.method_name == "__call__":
            own = hk.get_params().get(context.module.module_name, {})
            for name in ("output_channels", "output_size"):
                if "w" in own and hasattr(context.module, name):
                    setattr(context.module, name, own["w"].shape[-1])
        return method(*args, **kwargs)

    def forward(images, is_training):
        def norm(name):
            return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9, name=name)

        with hk.intercept_methods(follow):
            x = hk.Conv2D(6, 3, with_bias=False, name="conv1")(images)
            x = jax.nn.relu(norm("bn1")(x, is_training))
            x = hk.DepthwiseConv2D(1, 3, stride=2, name="depthwise")(x)
            x = hk.Conv2D(8, 1, name="pointwise")(jax.nn.relu(x))
            x = hk.Flatten()(hk.avg_pool(jax.nn.relu(x), (2, 2, 1), (2, 2, 1), "VALID"))
            return hk.nets.MLP([10, 7], name="mlp")(x)

    transformed = hk.transform_with_state(forward)
    params, state = jax.eval_shape(lambda: transformed.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), True))

    def haiku_function(variables, images):
        return transformed.apply(variables["params"], variables["state"], None, images, False)[0]

    return haiku_function, {"params": params, "state": state}


# ---- the table

SHAPE = (16, 16, 3)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and the expectations of the tests.

    Attributes:
      make: Creates the module; for a function, returns (function, its variables or their shapes).
      gates: Names that must be among the gates' names: layers whose channels can certainly be removed.
      count: Minimum number of gates, for networks whose layers have generated names.
      share: Minimum fraction of the FLOPs that must belong to layers with a gate.
      needs: Package that the network needs.
      batch_axis: Axis over which its batch norm averages in training.
    """

    make: Callable[[], Any]
    gates: tuple[str, ...] = ()
    count: int = 0
    share: float = 0.0
    needs: str | None = None
    batch_axis: str | None = None

    @property
    def available(self):
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def build(self, seed=0):
        """(model, random variables); (module, None) for an nnx module, whose variables are inside of it."""
        made = self.make()
        if isinstance(made, tuple):
            return made[0], drawn(made[1], seed)
        if isinstance(made, nnx.Module):
            state = nnx.state(made)
            nnx.update(made, drawn(state, seed))
            return made, None
        shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), jnp.zeros((1, *SHAPE))))
        return made, drawn(shapes, seed)


def run(network, model, variables, x, training=False):
    """Outputs of one of `NETWORKS`, unpruned or pruned; in training mode also the updated variables."""
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.set_attributes(deterministic=not training, use_running_average=not training, raise_if_not_found=False)
        outputs = model(x)
        return (outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))) if training else outputs
    if not isinstance(model, nn.Module):
        return (model(variables, x), {}) if training else model(variables, x)
    whole = network.make()
    mode = {
        name: value != training
        for name, value in MODES.items()
        if name in inspect.signature(type(whole).__call__).parameters
    }
    if not training:
        return model.apply(variables, x, **mode)
    rngs = {"dropout": jax.random.key(1), "drop_path": jax.random.key(2)}
    apply = functools.partial(model.apply, variables, **mode, rngs=rngs, mutable=["batch_stats"])
    return jax.vmap(apply, axis_name=network.batch_axis)(x[:, None]) if network.batch_axis else apply(x)


# How modules are told their mode, with the values of evaluation.
MODES = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}
STATISTICS = ("var", "state")  # must be positive; the latter holds all that Equinox and Haiku keep of batch norm


def drawn(tree, seed=0):
    """Random values for every floating-point leaf, so that biases and means behind removed channels matter."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        leaf, box = (meta.unbox(leaf), leaf) if isinstance(leaf, meta.AxisMetadata) else (leaf, None)
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        values = rng.normal(0, 0.3, leaf.shape)
        if set(names) & set(STATISTICS):
            values = abs(values) + 0.5
        elif len(leaf.shape) > 1:
            fan_in = np.prod(leaf.shape[1:] if "weight" in names else leaf.shape[:-1])
            values = values * np.sqrt(20 / fan_in)  # activations keep their size, so that none of them saturates
        elif "scale" in names or "gamma" in names or "weight" in names:
            values = values + 1
        values = jnp.asarray(values, leaf.dtype)
        return values if box is None else box.replace_boxed(values)

    return jax.tree.map_with_path(draw, tree, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))


def _zeros(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _nnx(kind):
    """Creates a module of zeros: its own initializers take seconds to compile, and `drawn` replaces their values."""

    def make():
        graph, state = nnx.split(nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0))))
        return nnx.merge(graph, jax.tree.map(_zeros, state))

    return make


def _merges():
    return (f"merge{i}_conv{j}" for i in range(2) for j in range(2))


NETWORKS = {
    # The first convolution of every basic block is read by the second alone: all but stem, projection and classifier.
    "resnet": Network(ResNet, gates=tuple(f"BasicBlock_{i}/Conv_0" for i in range(3)), share=0.77),
    # The first block widens, so that the stem has no shortcut beside it.
    "resnet, bottlenecks": Network(
        lambda: ResNet(block=BottleneckBlock, width=4, axis_name="batch"),
        gates=("stem", *(f"BottleneckBlock_{i}/Conv_{j}" for i in range(3) for j in range(2))),
        share=0.9,
        batch_axis="batch",
    ),
    # Whole groups of channels, of a grouped convolution and of group norm.
    "resnext": Network(
        lambda: ResNet(block=functools.partial(BottleneckBlock, groups=4), width=8),
        gates=("stem", *(f"BottleneckBlock_{i}/Conv_0" for i in range(3))),
        share=0.85,
    ),
    "resnet, group norm": Network(GroupNormResNet, gates=("BasicBlock_0/Conv_0", "BasicBlock_1/Conv_0"), share=0.85),
    "wide resnet": Network(WideResNet, gates=("init_conv", "stage0_block0/conv_1", "stage1_block0/conv_1"), share=0.95),
    "bit": Network(BigTransfer),
    # Nothing but chains: every layer touches a gate.
    "vgg": Network(VGG, gates=("Conv_0", "Conv_1", "Conv_2", "Dense_0", "Dense_1"), share=1.0),
    "mobilenet v1": Network(MobileNetV1, gates=("stem", "block0/pw", "block1/pw", "block2/pw"), share=1.0),
    "simple": Network(Simple, gates=("Conv_0", "Conv_1", "Dense_0"), share=1.0),
    # The convolution before the one whose output is concatenated.
    "densenet": Network(
        DenseNet, gates=tuple(f"block{i}_layer{j}/conv1" for i in range(2) for j in range(2)), share=0.84
    ),
    # Of each pair of convolutions the first; the last ones of the two levels above are skips.
    "u-net, transposed": Network(
        UNet, gates=("down0_conv0", "down1_conv0", "bottom_conv0", "bottom_conv1", *_merges()), share=0.99
    ),
    "u-net, resized": Network(
        lambda: UNet(transposed=False),
        gates=("down0_conv0", "down1_conv0", "bottom_conv0", "bottom_conv1", *_merges()),
        share=0.96,
    ),
    "regnet y": Network(
        RegNetY, gates=tuple(f"block{i}/{name}" for i in range(2) for name in ("conv1", "se/reduce")), share=0.75
    ),
    # In the first two blocks squeezing leaves a single channel; the last two blocks are added to nothing.
    "efficientnet": Network(
        EfficientNet,
        gates=(*(f"block{i}/expand" for i in range(3)), "block1/project", "block2/se/reduce", "block2/project", "head"),
        share=0.85,
    ),
    "convnext": Network(
        ConvNeXt, gates=tuple(f"stage{i}/pwconv1" for i in ("0_block0", "1_block0", "1_block1")), share=0.39
    ),
    "running averages": Network(RunningAverages, gates=("conv1", "conv2"), share=1.0),
    "mode as attribute": Network(ModeAttribute, gates=("conv1", "conv2"), share=1.0),
    "partitioned": Network(Partitioned, gates=("conv1", "conv2", "hidden"), share=1.0),
    "half precision": Network(HalfPrecision, gates=("conv0", "conv1"), share=0.99),
    "detector": Network(Detector, gates=("trunk0", "trunk1", "scores_hidden", "boxes_hidden"), share=1.0),
    # What the constant kernels touch cannot be made smaller by its variables, and all of it is touched.
    "blurred": Network(Blurred),
    "classifier of a backbone": Network(
        lambda: Classifier(Backbone()), gates=("backbone/conv1", "backbone/conv2"), share=1.0
    ),
    "sequential": Network(sequential, gates=("layers_0", "layers_2"), share=1.0),
    "narrow places": Network(NarrowPlaces, gates=("conv1", "conv2"), share=1.0),
    "nnx resnet": Network(_nnx(NnxResNet), gates=tuple(f"layers/{i}/conv0" for i in range(3)), share=0.77),
    "nnx mobilenet": Network(_nnx(NnxMobileNet), gates=("stem", "pointwise", "hidden"), share=1.0),
    "function": Network(lambda: (plain_function, plain_variables()), count=3, share=1.0),
    "equinox": Network(equinox_network, count=3, share=1.0, needs="equinox"),
    "haiku": Network(haiku_network, count=3, share=1.0, needs="haiku"),
}
