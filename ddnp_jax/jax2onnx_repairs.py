"""What jax2onnx (0.17.1) does wrong with residual and pooling networks, and the way around it.

Its own rearrangement of transposes breaks networks whose branches meet (ResNets with projections), and its pools take
fewer arguments than flax's. What comes out is compared with the network in any case (`ddnp_jax.export`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

_UNSOUND = "remove_redundant_transpose_pairs"  # ONNX Runtime removes them itself, when it loads a file
_POOLS = {"max_pool": True, "avg_pool": False}  # of flax; whether it takes the largest value


@contextlib.contextmanager
def sound_passes() -> Iterator[None]:
    """Around a conversion: leaves out the pass that breaks networks."""
    from jax2onnx.converter import ir_optimizations

    passes = ir_optimizations._OPTIMIZER_PASSES
    ir_optimizations._OPTIMIZER_PASSES = tuple(each for each in passes if each.name != _UNSOUND)
    try:
        yield
    finally:
        ir_optimizations._OPTIMIZER_PASSES = passes


@contextlib.contextmanager
def flax_pools() -> Iterator[None]:
    """Around the call of a network that is being converted: pools with positional arguments and padding in numbers."""
    with contextlib.ExitStack() as stack:
        for module in (nn, nn.pooling, nnx):
            for name, is_max in _POOLS.items():
                theirs = getattr(module, name)
                stack.callback(setattr, module, name, theirs)
                setattr(module, name, functools.partial(_pool, theirs, is_max))
        yield


def _pool(
    theirs: Callable[..., Any],
    is_max: bool,
    inputs: Any,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
    **options: Any,
) -> Any:
    """A pool of flax by that of jax2onnx, which takes keywords, and of paddings only those with names."""
    if not isinstance(padding, str):
        for axis, (before, after) in enumerate(padding, start=1):
            inputs = _padded(inputs, axis, before, after, is_max)
        padding = "VALID"
    strides = strides or (1,) * len(window_shape)
    return theirs(inputs, window_shape=window_shape, strides=strides, padding=padding, **options)


def _padded(inputs: Any, axis: int, before: int, after: int, by_edge: bool) -> Any:
    """Images with further rows or columns, zeros or the outermost: a window that holds these has that one in it too.

    By slices: jax2onnx converts a padding with edges into something else.
    """
    first, last = (lax.slice_in_dim(inputs, at, at + 1, axis=axis) for at in (0, inputs.shape[axis] - 1))
    scale = 1.0 if by_edge else 0.0
    return jnp.concatenate([*[scale * first] * before, inputs, *[scale * last] * after], axis)
