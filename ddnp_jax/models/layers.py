"""Common parts of the backbones: their attributes, convolution with batch norm, and depthwise convolution."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Backbone(nn.Module):
    """A network whose numbers of inner channels are an attribute.

    Attributes:
      num_classes: Number of outputs of the classifier.
      widths: Channels inside the blocks, in the order of the forward pass; None for the unpruned network.
      dtype: Data type of the computation; parameters are always float32.
    """

    num_classes: int
    widths: Sequence[int] | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.widths = self.inner_widths
        whole = self.whole_widths()
        if len(self.widths) != len(whole):
            raise ValueError(f"widths has {len(self.widths)} entries; this network has {len(whole)}.")
        super().__post_init__()

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """`widths`, or those of the unpruned network if `widths` is None."""
        return self.whole_widths() if self.widths is None else tuple(self.widths)

    def whole_widths(self) -> tuple[int, ...]:
        """`widths` of the unpruned network."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ConvNorm:
    """A convolution without bias followed by batch norm, as two submodules of the calling module with given names.

    Attributes:
      train: Whether batch norm uses the statistics of the batch.
      dtype: Data type of the computation.
      momentum: Weight of the old running statistics in the new ones.
      epsilon: Constant that is added to the variance.
      padding: 'SAME' pads like TensorFlow. None pads by half the kernel on every side, like PyTorch's networks. The
        two differ for strides above 1.
    """

    train: bool
    dtype: Any
    momentum: float = 0.9
    epsilon: float = 1e-5
    padding: Literal["SAME"] | None = None

    def __call__(
        self,
        x: jax.Array,
        channels: int,
        kernel: int,
        stride: int = 1,
        *,
        names: tuple[str, str],
        depthwise: bool = False,
    ) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / stride), ceil(W / stride), channels), for odd kernels."""
        grouped: dict[str, Any] = (
            {"feature_group_count": channels, "conv_general_dilated": depthwise_conv} if depthwise else {}
        )
        conv = nn.Conv(
            channels,
            (kernel, kernel),
            stride,
            padding=kernel // 2 if self.padding is None else self.padding,
            use_bias=False,
            dtype=self.dtype,
            name=names[0],
            **grouped,
        )
        norm = nn.BatchNorm(
            use_running_average=not self.train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=names[1],
        )
        return norm(conv(x))


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **arguments: Any,
) -> jax.Array:
    """Depthwise form of `jax.lax.conv_general_dilated`, with the fastest implementation for each platform.

    For use as `flax.linen.Conv(..., conv_general_dilated=depthwise_conv)`. On CPU, XLA's grouped convolutions are
    dozens of times slower than one multiply-add of the shifted image per kernel entry. On other platforms, XLA's own
    implementation is fast.

    Args:
      x: Images (N, H, W, C).
      kernel: Kernel (h, w, 1, C).
      window_strides: Strides along H and W.
      padding: 'SAME', 'VALID', or (pixels before, pixels after) of H and W.
      **arguments: Other arguments of `conv_general_dilated`; dilations are not supported.

    Returns:
      Images (N, H', W', C).

    Raises:
      ValueError: The kernel is not depthwise, or the convolution is dilated.
    """
    dilations = [*(arguments.get("lhs_dilation") or ()), *(arguments.get("rhs_dilation") or ())]
    if kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]) or any(d != 1 for d in dilations):
        raise ValueError(
            f"depthwise_conv needs an undilated kernel (h, w, 1, {x.shape[-1]}), got {kernel.shape} with dilations "
            f"{dilations}."
        )

    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], window_strides, padding)

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **arguments)

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _shifted_sum(x, kernel, tuple(window_strides), tuple(map(tuple, padding)))

    return lax.platform_dependent(x, kernel, cpu=shifted, default=native)


# `jit`: layers of the same shape are traced once. `checkpoint`: a gradient step computes the shifted images again
# instead of keeping one per kernel entry.
@functools.partial(jax.jit, static_argnums=(2, 3))
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _shifted_sum(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: tuple[tuple[int, ...], ...]
) -> jax.Array:
    dtype = x.dtype
    x, kernel = (a.astype(jnp.promote_types(dtype, jnp.float32)) for a in (x, kernel))
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in (0, 1))
    total = jnp.zeros((), x.dtype)
    for i, j in itertools.product(*map(range, kernel.shape[:2])):
        end = (i + (height - 1) * strides[0] + 1, j + (width - 1) * strides[1] + 1)
        shifted = lax.slice(x, (0, i, j, 0), (x.shape[0], *end, x.shape[3]), (1, *strides, 1))
        total += shifted * kernel[i, j].reshape(1, 1, 1, -1)
    return total.astype(dtype)
