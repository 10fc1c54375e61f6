"""ResNets for ImageNet (He et al. 2016) in torchvision's form: a bottleneck's stride is in its 3x3 convolution."""

from functools import partial

import flax.linen as nn
import jax

from ddnp_jax.models.layers import Backbone, ConvNorm
from ddnp_jax.models.resnet_cifar import BasicBlock, shortcut

STAGES = (64, 128, 256, 512)
EXPANSION = 4  # of a bottleneck: output channels per inner channel


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1; the first two have `widths` output channels, which are inside the block."""

    inputs: int
    widths: tuple[int, int]
    channels: int
    stride: int
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / stride, W / stride, channels)."""
        y = nn.relu(self.layer(x, self.widths[0], 1, names=("conv1", "bn1")))
        y = nn.relu(self.layer(y, self.widths[1], 3, self.stride, names=("conv2", "bn2")))
        y = self.layer(y, self.channels, 1, names=("conv3", "bn3"))
        return nn.relu(y + shortcut(x, self.inputs, self.channels, self.stride, "projection", self.layer))


class ResNet(Backbone, kw_only=True):
    """ResNet for images of about 224x224, NHWC; further attributes as for `Backbone`.

    Attributes:
      blocks: Number of blocks per stage.
      bottleneck: Whether the blocks are bottlenecks; otherwise they are basic blocks.
      widths: Channels between the convolutions of each block: one number per basic block, and two per bottleneck, the
        outputs of conv1 and conv2.
    """

    blocks: tuple[int, ...]
    bottleneck: bool

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        inside = 2 if self.bottleneck else 1
        return tuple(c for c, count in zip(STAGES, self.blocks, strict=True) for _ in range(inside * count))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype)
        widths = iter(self.inner_widths)
        x = nn.relu(layer(x, STAGES[0], 7, 2, names=("conv1", "bn1")))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        inputs = STAGES[0]
        for stage, (channels, count) in enumerate(zip(STAGES, self.blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                if self.bottleneck:
                    inner = (next(widths), next(widths))
                    x = Bottleneck(inputs, inner, EXPANSION * channels, stride, layer, name=name)(x)
                else:
                    x = BasicBlock(inputs, next(widths), channels, stride, "projection", layer, name=name)(x)
                inputs = EXPANSION * channels if self.bottleneck else channels
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x.mean((1, 2)))


MODELS = {
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True),
}
