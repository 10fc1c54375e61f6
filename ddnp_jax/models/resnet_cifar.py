"""ResNets for 32x32 images (He et al. 2016, section 4.2): three stages of basic blocks with 16, 32 and 64 channels."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STAGES = (16, 32, 64)


def _shortcut(x: jax.Array, channels: int, stride: int, kind: str) -> jax.Array:
    """Parameter-free shortcut to `channels` channels at 1/`stride` of the resolution."""
    missing = channels - x.shape[-1]
    if stride == 1 and missing == 0:
        return x
    if kind == "subsample":  # He et al., option A
        return jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(missing // 2, missing - missing // 2)])
    if kind == "avgpool":  # the form of the DDNP and NPPM authors' networks
        pooled = nn.avg_pool(x, (stride, stride), (stride, stride))
        return jnp.pad(pooled, [(0, 0)] * 3 + [(0, missing)])
    raise ValueError(f"shortcut={kind!r} is unknown; use 'subsample' or 'avgpool'.")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; only the first one's output, `width` channels, is inside the block."""

    width: int
    channels: int
    stride: int
    shortcut: str
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / stride, W / stride, channels)."""
        conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, dtype=self.dtype)
        y = conv(self.width, strides=self.stride, name="conv1")(x)
        y = nn.relu(self.norm(use_running_average=not train, name="bn1")(y))
        y = conv(self.channels, name="conv2")(y)
        y = self.norm(use_running_average=not train, name="bn2")(y)
        return nn.relu(y + _shortcut(x, self.channels, self.stride, self.shortcut))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for small images, NHWC.

    Attributes:
      num_classes: outputs of the classifier.
      blocks_per_stage: n.
      widths: channels between the two convolutions of each block, in order; None is the whole network.
      shortcut: 'subsample' (He et al. option A) or 'avgpool' (the DDNP authors' form); neither has parameters.
      dtype: of the computation; parameters stay float32.
      bn_axis_name: the mapped axis over which training-mode batch statistics are averaged, or None.
    """

    num_classes: int
    blocks_per_stage: int
    widths: Sequence[int] | None = None
    shortcut: str = "subsample"
    dtype: Any = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalized images (N, H, W, 3) to logits (N, num_classes)."""
        norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5, dtype=self.dtype, axis_name=self.bn_axis_name)
        widths = self.widths or [c for c in STAGES for _ in range(self.blocks_per_stage)]
        if len(widths) != 3 * self.blocks_per_stage:
            raise ValueError(f"widths has {len(widths)} entries; this network has {3 * self.blocks_per_stage} blocks.")
        x = nn.Conv(STAGES[0], (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(norm(use_running_average=not train, name="bn1")(x))
        for i, width in enumerate(widths):
            stage, block = divmod(i, self.blocks_per_stage)
            stride = 2 if stage > 0 and block == 0 else 1
            x = BasicBlock(
                width, STAGES[stage], stride, self.shortcut, norm, self.dtype, name=f"layer{stage + 1}_{block}"
            )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x)


MODELS = {f"resnet{6 * n + 2}": partial(CifarResNet, blocks_per_stage=n) for n in (3, 5, 7, 9, 18)}
