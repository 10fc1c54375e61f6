"""Workarounds for three errors of jax2onnx (0.17.1).

Its optimization of transposes breaks networks whose branches are added (ResNets with projections), its pooling
functions take fewer arguments than those of flax, and so does the `cumsum` that it leaves in `jax.numpy`. The converted
network is always compared with the original one (`ddnp_jax.export`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

_UNSOUND = "remove_redundant_transpose_pairs"  # ONNX Runtime removes these pairs itself, when it loads a file
_POOLS = {"max_pool": True, "avg_pool": False}  # pooling functions of flax: whether they take the maximum


@contextlib.contextmanager
def sound_passes() -> Iterator[None]:
    """Disables, during a conversion, the optimization pass of jax2onnx that breaks networks."""
    from jax2onnx.converter import ir_optimizations

    passes = ir_optimizations._OPTIMIZER_PASSES
    ir_optimizations._OPTIMIZER_PASSES = tuple(each for each in passes if each.name != _UNSOUND)
    try:
        yield
    finally:
        ir_optimizations._OPTIMIZER_PASSES = passes


@contextlib.contextmanager
def kept_cumsum() -> Iterator[None]:
    """Restores `jax.numpy.cumsum` after a conversion, the first of which replaces it for the rest of the process."""
    own = jnp.cumsum
    try:
        yield
    finally:
        jnp.cumsum = own


@contextlib.contextmanager
def flax_pools() -> Iterator[None]:
    """Supports, while a network is being converted, pooling with positional arguments and numeric padding."""
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
    """Pooling with the arguments of flax, by that of jax2onnx, which takes only keywords and paddings by name."""
    if not isinstance(padding, str):
        for axis, (before, after) in enumerate(padding, start=1):
            inputs = _padded(inputs, axis, before, after, is_max)
        padding = "VALID"
    strides = strides or (1,) * len(window_shape)
    return theirs(inputs, window_shape=window_shape, strides=strides, padding=padding, **options)


def _padded(inputs: Any, axis: int, before: int, after: int, by_edge: bool) -> Any:
    """Pads images along an axis with zeros, or with copies of their outermost row or column.

    Copies do not change a maximum, because every window that contains a copy contains the original too. They are made
    by slices, because jax2onnx converts edge padding incorrectly.
    """
    first, last = (lax.slice_in_dim(inputs, at, at + 1, axis=axis) for at in (0, inputs.shape[axis] - 1))
    scale = 1.0 if by_edge else 0.0
    return jnp.concatenate([*[scale * first] * before, inputs, *[scale * last] * after], axis)
