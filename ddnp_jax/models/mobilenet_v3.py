"""MobileNetV3-small (Howard et al. 2019, table 2) in torchvision's form."""

from collections.abc import Callable

import flax.linen as nn
import jax

from ddnp_jax.models.layers import Backbone, ConvNorm

STEM, LAST, HIDDEN = 16, 576, 1024
# Per block: kernel, expanded channels, output channels, squeeze-excite, hard-swish, stride. The first has no expansion.
BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


def squeezed_channels(expanded: int) -> int:
    """A quarter of the expanded channels, rounded to the nearest multiple of 8, but at most a tenth downwards."""
    quarter = expanded // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of the means of all channels."""

    squeezed: int
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to the same shape."""
        scale = x.mean((1, 2), keepdims=True)
        scale = nn.relu(nn.Conv(self.squeezed, (1, 1), dtype=self.layer.dtype, name="fc1")(scale))
        return x * nn.hard_sigmoid(nn.Conv(x.shape[-1], (1, 1), dtype=self.layer.dtype, name="fc2")(scale))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-excite and projection.

    There is no expansion if `width` is None, and no squeeze-excite if `squeezed` is 0.
    """

    inputs: int
    width: int | None
    channels: int
    kernel: int
    stride: int
    squeezed: int
    activation: Callable[[jax.Array], jax.Array]
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / stride), ceil(W / stride), channels)."""
        y, i = x, 0
        if self.width is not None:
            y, i = self.activation(self.layer(x, self.width, 1, names=("block_0_0", "block_0_1"))), 1
        names = (f"block_{i}_0", f"block_{i}_1")
        y = self.activation(self.layer(y, y.shape[-1], self.kernel, self.stride, names=names, depthwise=True))
        if self.squeezed:
            i += 1
            y = SqueezeExcite(self.squeezed, self.layer, name=f"block_{i}")(y)
        y = self.layer(y, self.channels, 1, names=(f"block_{i + 1}_0", f"block_{i + 1}_1"))
        return x + y if self.stride == 1 and self.inputs == self.channels else y


class MobileNetV3Small(Backbone, kw_only=True):
    """MobileNetV3-small for images of about 224x224, NHWC; further attributes as for `Backbone`.

    Attributes:
      widths: Expanded channels of each block except the first. The inner channels of squeeze-excite are not pruned.
    """

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        return tuple(expanded for _, expanded, *_ in BLOCKS[1:])

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype, momentum=0.99, epsilon=1e-3)
        x = nn.hard_swish(layer(x, STEM, 3, 2, names=("features_0_0", "features_0_1")))
        inputs = STEM
        for i, (width, row) in enumerate(zip((None, *self.inner_widths), BLOCKS, strict=True), start=1):
            kernel, expanded, channels, excites, swish, stride = row
            squeezed = squeezed_channels(expanded) if excites else 0
            activation = nn.hard_swish if swish else nn.relu
            block = InvertedResidual(
                inputs, width, channels, kernel, stride, squeezed, activation, layer, name=f"features_{i}"
            )
            x, inputs = block(x), channels
        last = f"features_{len(BLOCKS) + 1}"
        x = nn.hard_swish(layer(x, LAST, 1, names=(f"{last}_0", f"{last}_1"))).mean((1, 2))
        x = nn.hard_swish(nn.Dense(HIDDEN, dtype=self.dtype, name="classifier_0")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier_3")(x)


MODELS = {"mobilenet_v3_small": MobileNetV3Small}
