"""MobileNetV2 for 32x32 images in the DDNP and NPPM authors' form.

Only its fourth and sixth stage halve the image, which gives 304.08 million multiply-accumulates. Besides the strides,
it differs from the ImageNet network in three ways: the ReLUs are not limited to 6; the first block has an expansion,
to as many channels as its input has; and every block of stride 1 has a shortcut, with a convolution if the numbers of
channels differ.
"""

import flax.linen as nn
import jax

from ddnp_jax.models.layers import Backbone, ConvNorm
from ddnp_jax.models.mobilenet_v2 import HEAD, STEM, blocks


class Block(nn.Module):
    """Expansion to `width` channels, depthwise convolution, linear projection."""

    inputs: int
    width: int
    channels: int
    stride: int
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / stride, W / stride, channels)."""
        y = nn.relu(self.layer(x, self.width, 1, names=("conv1", "bn1")))
        y = nn.relu(self.layer(y, self.width, 3, self.stride, names=("conv2", "bn2"), depthwise=True))
        y = self.layer(y, self.channels, 1, names=("conv3", "bn3"))
        if self.stride != 1:
            return y
        return y + (
            x if self.inputs == self.channels else self.layer(x, self.channels, 1, names=("shortcut_0", "shortcut_1"))
        )


class CifarMobileNetV2(Backbone, kw_only=True):
    """MobileNetV2 for small images, NHWC; further attributes as for `Backbone`.

    Attributes:
      strides: Strides of the seven stages. The weights do not depend on them, so a checkpoint that was trained with
        other strides loads without an error.
      widths: Expanded channels of each block.
    """

    strides: tuple[int, ...] = (1, 1, 1, 2, 1, 2, 1)

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        return tuple(expanded for expanded, _, _ in blocks(self.strides))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype)
        x = nn.relu(layer(x, STEM, 3, names=("conv1", "bn1")))
        inputs = STEM
        for i, (width, (_, channels, stride)) in enumerate(zip(self.inner_widths, blocks(self.strides), strict=True)):
            x = Block(inputs, width, channels, stride, layer, name=f"layers_{i}")(x)
            inputs = channels
        x = nn.relu(layer(x, HEAD, 1, names=("conv2", "bn2"))).mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x)


MODELS = {"mobilenet_v2_cifar": CifarMobileNetV2}
