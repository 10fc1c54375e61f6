"""ResNets for 32x32 images (He et al. 2016, section 4.2): three stages of basic blocks with 16, 32 and 64 channels."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddnp_jax.models.layers import Backbone, ConvNorm

STAGES = (16, 32, 64)


def shortcut(x: jax.Array, inputs: int, channels: int, stride: int, kind: str, layer: ConvNorm) -> jax.Array:
    """Shortcut of a block from `inputs` to `channels` channels at 1/`stride` of the resolution.

    Only 'projection' has parameters. The numbers are those of the unpruned network: where streams are pruned, `x` has
    fewer channels, and a block without a projection still has none.
    """
    missing = channels - inputs
    if stride == 1 and missing == 0:
        return x
    if kind == "projection":  # He et al., option B
        return layer(x, channels, 1, stride, names=("downsample_0", "downsample_1"))
    if kind == "subsample":  # He et al., option A
        return jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(missing // 2, missing - missing // 2)])
    if kind == "avgpool":  # the form of the DDNP and NPPM authors' networks
        pooled = nn.avg_pool(x, (stride, stride), (stride, stride))
        return jnp.pad(pooled, [(0, 0)] * 3 + [(0, missing)])
    raise ValueError(f"shortcut={kind!r} is unknown; use 'subsample', 'avgpool' or 'projection'.")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first one has `width` output channels, which are inside the block."""

    inputs: int
    width: int
    channels: int
    stride: int
    shortcut: str
    layer: ConvNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / stride, W / stride, channels)."""
        y = nn.relu(self.layer(x, self.width, 3, self.stride, names=("conv1", "bn1")))
        y = self.layer(y, self.channels, 3, names=("conv2", "bn2"))
        return nn.relu(y + shortcut(x, self.inputs, self.channels, self.stride, self.shortcut, self.layer))


class CifarResNet(Backbone, kw_only=True):
    """ResNet-(6n + 2) for small images, NHWC; further attributes as for `Backbone`.

    Attributes:
      blocks_per_stage: Number of blocks per stage, n.
      widths: Channels between the two convolutions of each block.
      shortcut: 'subsample' (He et al. option A), 'avgpool' (the DDNP authors' form), both without parameters, or
        'projection' (option B).
    """

    blocks_per_stage: int
    shortcut: str = "subsample"

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        return tuple(channels for channels in STAGES for _ in range(self.blocks_per_stage))

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        layer = ConvNorm(train, self.dtype)
        x = nn.relu(layer(x, STAGES[0], 3, names=("conv1", "bn1")))
        inputs = STAGES[0]
        for i, width in enumerate(self.inner_widths):
            stage, block = divmod(i, self.blocks_per_stage)
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"layer{stage + 1}_{block}"
            x = BasicBlock(inputs, width, STAGES[stage], stride, self.shortcut, layer, name=name)(x)
            inputs = STAGES[stage]
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x)


MODELS = {f"resnet{6 * n + 2}": partial(CifarResNet, blocks_per_stage=n) for n in (3, 5, 7, 9, 18)}
