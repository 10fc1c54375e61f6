"""MobileNetV2 for ImageNet (Sandler et al. 2018) in torchvision's form: the first block has no expansion."""

import flax.linen as nn
import jax

from ddnp_jax.models.layers import Backbone, ConvNorm

STEM, HEAD = 32, 1280
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))  # t, channels, blocks


def blocks(strides: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Returns (expanded channels, output channels, stride) of each block, from the strides of the stages (table 2)."""
    inputs, rows = STEM, []
    for (expansion, channels, count), stride in zip(STAGES, strides, strict=True):
        for i in range(count):
            rows.append((expansion * inputs, channels, stride if i == 0 else 1))
            inputs = channels
    return rows


class InvertedResidual(nn.Module):
    """Expansion to `width` channels (none if `width` is None), depthwise convolution and linear projection."""

    inputs: int
    width: int | None
    channels: int
    stride: int
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / stride, W / stride, channels)."""
        y, i = x, 0
        if self.width is not None:
            y, i = nn.relu6(self.layer(x, self.width, 1, names=("conv_0_0", "conv_0_1"))), 1
        names = (f"conv_{i}_0", f"conv_{i}_1")
        y = nn.relu6(self.layer(y, y.shape[-1], 3, self.stride, names=names, depthwise=True))
        y = self.layer(y, self.channels, 1, names=(f"conv_{i + 1}", f"conv_{i + 2}"))
        return x + y if self.stride == 1 and self.inputs == self.channels else y


class MobileNetV2(Backbone, kw_only=True):
    """MobileNetV2 for images of about 224x224, NHWC; further attributes as for `Backbone`.

    Attributes:
      widths: Expanded channels of each block except the first, which has no expansion.
    """

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        return tuple(expanded for expanded, _, _ in self._blocks()[1:])

    def _blocks(self) -> list[tuple[int, int, int]]:
        return blocks(strides=(1, 2, 2, 2, 1, 2, 1))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype)
        x = nn.relu6(layer(x, STEM, 3, 2, names=("features_0_0", "features_0_1")))
        rows, inputs = self._blocks(), STEM
        for i, (width, (_, channels, stride)) in enumerate(zip((None, *self.inner_widths), rows, strict=True), start=1):
            x = InvertedResidual(inputs, width, channels, stride, layer, name=f"features_{i}")(x)
            inputs = channels
        last = f"features_{len(rows) + 1}"
        x = nn.relu6(layer(x, HEAD, 1, names=(f"{last}_0", f"{last}_1"))).mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="classifier_1")(x)


MODELS = {"mobilenet_v2": MobileNetV2}
