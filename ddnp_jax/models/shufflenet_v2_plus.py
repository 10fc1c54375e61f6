"""ShuffleNetV2+ by Megvii: ShuffleNetV2 (Ma et al. 2018) with searched units, squeeze-excite and hard-swish."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddnp_jax.models.layers import Backbone, ConvNorm

STEM, HEAD = 16, 1280
XCEPTION = 0  # used instead of a kernel size, for a unit of three depthwise separable convolutions
# For each stage: the kernel of each unit, whether the activation is hard-swish, and whether there is squeeze-excite.
STAGES = (
    ((3, 3, XCEPTION, 5), False, False),
    ((5, 5, 3, 3), True, False),
    ((7, 3, 7, 5, 5, 3, 7, 3), True, True),
    ((7, 5, XCEPTION, 7), True, True),
)


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of the means of all channels."""

    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to the same shape."""
        scale = x.mean((1, 2), keepdims=True)
        scale = nn.relu(self.layer(scale, x.shape[-1] // 4, 1, names=("SE_opr_1", "SE_opr_2")))
        excite = nn.Conv(x.shape[-1], (1, 1), use_bias=False, dtype=self.layer.dtype, name="SE_opr_4")
        return x * nn.hard_sigmoid(excite(scale))


class Unit(nn.Module):
    """A unit with two branches.

    At stride 1, half of the channels skip the unit, and the other half pass through the main branch. At stride 2, both
    branches read all channels.

    Attributes:
      widths: Inner channels of the main branch: one number, or two for an Xception-like unit.
      channels: Number of output channels.
      kernel: Side of the depthwise convolution's kernel, or XCEPTION.
      stride: 1 or 2.
      swish: Whether the activation is hard-swish; otherwise it is ReLU.
      excites: Whether the main branch ends with squeeze-excite.
      layer: Convolution and batch norm.
    """

    widths: tuple[int, ...]
    channels: int
    kernel: int
    stride: int
    swish: bool
    excites: bool
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / stride), ceil(W / stride), channels)."""
        # The shuffle of the previous unit's output and the split are one step: every second channel skips this unit.
        passed, x = (x, x) if self.stride == 2 else (x[..., ::2], x[..., 1::2])
        if self.stride == 2:
            passed = self._depthwise("branch_proj", 0, passed, self.kernel, self.stride)
            passed = self._pointwise("branch_proj", 2, passed, passed.shape[-1])
        return jnp.concatenate([passed, self._main(x, self.channels - passed.shape[-1])], axis=-1)

    def _main(self, x: jax.Array, outputs: int) -> jax.Array:
        name = "branch_main"
        if self.kernel == XCEPTION:
            for i, channels in zip((0, 5, 10), (*self.widths, outputs), strict=True):
                x = self._pointwise(name, i + 2, self._depthwise(name, i, x, 3), channels)
            end = 15
        else:
            x = self._pointwise(name, 0, x, self.widths[0])
            x = self._pointwise(name, 5, self._depthwise(name, 3, x, self.kernel, self.stride), outputs)
            end = 8
        return SqueezeExcite(self.layer, name=f"{name}_{end}")(x) if self.excites else x

    def _depthwise(self, branch: str, i: int, x: jax.Array, kernel: int, stride: int = 1) -> jax.Array:
        names = (f"{branch}_{i}", f"{branch}_{i + 1}")
        return self.layer(x, x.shape[-1], kernel, stride, names=names, depthwise=True)

    def _pointwise(self, branch: str, i: int, x: jax.Array, channels: int) -> jax.Array:
        x = self.layer(x, channels, 1, names=(f"{branch}_{i}", f"{branch}_{i + 1}"))
        return nn.hard_swish(x) if self.swish else nn.relu(x)


class ShuffleNetV2Plus(Backbone, kw_only=True):
    """ShuffleNetV2+ for images of about 224x224, NHWC; further attributes as for `Backbone`.

    Attributes:
      stages: Output channels of each stage.
      widths: Inner channels of the units' main branches; two numbers for an Xception-like unit.
    """

    stages: tuple[int, ...]

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        rows = zip(self.stages, STAGES, strict=True)
        return tuple(c // 2 for c, (kernels, *_) in rows for kernel in kernels for _ in range(_inner(kernel)))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype)
        widths = iter(self.inner_widths)
        x = nn.hard_swish(layer(x, STEM, 3, 2, names=("first_conv_0", "first_conv_1")))
        i = 0
        for channels, (kernels, swish, excites) in zip(self.stages, STAGES, strict=True):
            for block, kernel in enumerate(kernels):
                inner = tuple(next(widths) for _ in range(_inner(kernel)))
                stride = 2 if block == 0 else 1
                x = Unit(inner, channels, kernel, stride, swish, excites, layer, name=f"features_{i}")(x)
                i += 1
        x = nn.hard_swish(layer(x, HEAD, 1, names=("conv_last_0", "conv_last_1")))
        x = SqueezeExcite(layer, name="LastSE")(x.mean((1, 2), keepdims=True)).squeeze((1, 2))
        x = nn.hard_swish(nn.Dense(HEAD, use_bias=False, dtype=self.dtype, name="fc_0")(x))
        return nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype, name="classifier_0")(x)


def _inner(kernel: int) -> int:
    """Inner widths of a unit."""
    return 2 if kernel == XCEPTION else 1


MODELS = {
    "shufflenet_v2_plus_small": partial(ShuffleNetV2Plus, stages=(36, 104, 208, 416)),
    "shufflenet_v2_plus_medium": partial(ShuffleNetV2Plus, stages=(48, 128, 256, 512)),
    "shufflenet_v2_plus_large": partial(ShuffleNetV2Plus, stages=(68, 168, 336, 672)),
}
