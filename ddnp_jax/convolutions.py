"""Convolutions and their gradients in forms that are faster on a CPU, for programs of networks.

Other platforms keep XLA's own forms. What was measured is in docs/performance.md:

- XLA:CPU is slow with few channels. Where AVX-512 is available, two neighboring columns of an image with fewer
  than 16 channels become the channels of one, which needs no copy, only a kernel with zeros between its entries.
- XLA:CPU computes the gradient of a kernel as a convolution whose window is the entire map, which mostly takes 1.5 to 4
  times as long as the convolution itself. Here a few images at a time are copied, shifted along the columns, and their
  gradients shifted along the rows, so that one matrix product, whose operands are still in the processor's cache, holds
  the products of all entries of the kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ddnp_jax import cpu
from ddnp_jax.interpreter import Interpreter, evaluate
from ddnp_jax.topology import jaxprs

Padding = Sequence[tuple[int, int]]

KERNEL_GRADIENT = "kernel_gradient"  # scope of these operations in profiles
_VECTOR = 16  # numbers in a vector of AVX-512
_LEAST_PIXELS = 256  # of a matrix product: with fewer, adding up its results takes longer than computing them
_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # kernels: HWIO


def with_fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function, whose convolutions and their gradients are faster on a CPU.

    Only float32 convolutions over two dimensions with stride 1 are computed differently: not grouped or dilated ones,
    nor those inside loops, branches and functions with derivatives of their own, nor arrays with explicit sharding. The
    result differs by rounding, and next to an infinite value it may be NaN. Supports reverse-mode differentiation only.

    Args:
      function: A function of arrays that JAX can trace.
    """

    def run(*args: Any) -> Any:
        return evaluate(function, _FastConvolutions(), *args)

    return run


class _FastConvolutions(Interpreter):
    """Evaluates a program with fast convolutions, see `with_fast_convolutions`."""

    def _is_unchanged(self, first: int, end: int) -> bool:
        return first == end  # no convolution or matrix product

    def _enter(self, eqn: core.JaxprEqn, program: Any, operands: list[Any], first: int) -> list[Any]:
        if eqn.primitive.name in jaxprs.DIFFERENTIATED:
            return super().compute(program[0], eqn, operands)
        return super()._enter(eqn, program, operands, first)

    def compute(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        """Computes one equation."""
        is_fast = _is_covered(eqn) and not any(map(_is_sharded, operands))
        return [_convolve(eqn, *operands)] if is_fast else super().compute(jaxpr, eqn, operands)


def _is_covered(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "conv_general_dilated":
        return False
    given = eqn.params
    covered = {
        "window_strides": (1, 1),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "feature_group_count": 1,
        "batch_group_count": 1,
        "dimension_numbers": _NHWC,
    }
    return (
        all(given[name] == value for name, value in covered.items())
        and all(0 not in jaxprs.shape_of(atom) for atom in (*eqn.invars, *eqn.outvars))
        and min(map(min, given["padding"])) >= 0
        # On lower maps, most rows of the kernel gradient's matrix product would be padding.
        and jaxprs.shape_of(eqn.outvars[0])[1] >= jaxprs.shape_of(eqn.invars[1])[0]
        and all(jaxprs.dtype_of(atom) == jnp.float32 for atom in (*eqn.invars, *eqn.outvars))
    )


def _is_sharded(x: Any) -> bool:
    """Whether the type of an array says which devices hold it: its axes cannot be split or joined then."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _convolve(eqn: core.JaxprEqn, x: jax.Array, kernel: jax.Array) -> jax.Array:
    form = _Convolution(eqn)
    scope = str(eqn.source_info.name_stack) or eqn.primitive.name  # the layer's, for profiles

    def output(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with jax.named_scope(scope):
            return form.output(x, kernel)

    def backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope(scope):
            return form.gradient_of_input(gradient, *saved), form.gradient_of_kernel(gradient, *saved)

    convolve = jax.custom_vjp(output)
    convolve.defvjp(lambda x, kernel: (output(x, kernel), (x, kernel)), backward)
    return convolve(x, kernel)


class _Convolution:
    """A convolution that `_is_covered`, and its gradients."""

    def __init__(self, eqn: core.JaxprEqn) -> None:
        self._eqn = eqn
        rows, columns, *_ = jaxprs.shape_of(eqn.invars[1])
        self._size = (rows, columns)
        self._padding: Padding = eqn.params["padding"]

    def output(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution of `x` (N, H, W, C) with `kernel` (h, w, C, D)."""
        if not _is_packed(kernel.shape, jaxprs.shape_of(self._eqn.outvars[0])[2], self._padding):
            return self._native(x, kernel)
        packed = functools.partial(packed_convolution, padding=self._padding)
        return lax.platform_dependent(x, kernel, cpu=packed, default=self._native)

    def gradient_of_input(self, gradient: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The gradient (N, H, W, C) for that of the output (N, H', W', D)."""
        padding = [(n - 1 - a, n - 1 - b) for n, (a, b) in zip(self._size, self._padding, strict=True)]

        def native(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.linear_transpose(lambda x: self._native(x, kernel), x)(gradient)[0]

        def packed(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
            return packed_convolution(gradient, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), padding)

        if not _is_packed(kernel.shape, x.shape[2], padding):
            return native(gradient, kernel)
        return lax.platform_dependent(gradient, kernel, cpu=packed, default=native)

    def gradient_of_kernel(self, gradient: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The gradient (h, w, C, D) for that of the output (N, H', W', D)."""

        def native(x: jax.Array, gradient: jax.Array) -> jax.Array:
            return jax.linear_transpose(lambda kernel: self._native(x, kernel), kernel)(gradient)[0]

        def matrix_products(x: jax.Array, gradient: jax.Array) -> jax.Array:
            with jax.named_scope(KERNEL_GRADIENT):
                return kernel_gradient(x, gradient, self._size, self._padding)

        return lax.platform_dependent(x, gradient, cpu=matrix_products, default=native)

    def _native(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self._eqn.primitive.bind(x, kernel, **self._eqn.params)


def _is_packed(kernel_shape: Sequence[int], width: int, padding: Padding) -> bool:
    """Whether a convolution whose output has `width` columns is faster with packed columns."""
    _, columns, *channels = kernel_shape
    is_possible = width % 2 == 0 and min(map(min, padding)) >= 0
    is_small = max(channels) <= _VECTOR and min(channels) < _VECTOR
    return is_possible and columns >= 3 and is_small and cpu.has_avx512()


def packed_convolution(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Convolution with stride 1, whose channels are those of two neighboring columns.

    Args:
      x: Images (N, H, W, C).
      kernel: Kernel (h, w, C, D).
      padding: (pixels before, pixels after) of H and W, not negative.

    Returns:
      Images (N, H', W', D); W' must be even.
    """
    rows, columns, channels, features = kernel.shape
    images, height, width, _ = x.shape
    outputs = sum(padding[1]) + width - columns + 1
    pairs = columns // 2 + 1  # of columns that a pair of outputs reads
    spread = jnp.zeros((rows, 2 * pairs, channels, 2, features), kernel.dtype)
    for i in range(2):
        spread = spread.at[:, i : i + columns, :, i].set(kernel)
    spread = spread.reshape(rows, pairs, 2 * channels, 2 * features)
    before = padding[1][0]
    after = outputs + 2 * (pairs - 1) - width - before
    x = jnp.pad(x, ((0, 0), (0, 0), (before, after), (0, 0))).reshape(images, height, -1, 2 * channels)
    y = lax.conv_general_dilated(x, spread, (1, 1), (padding[0], (0, 0)), dimension_numbers=_NHWC)
    return y.reshape(images, -1, outputs, features)


def kernel_gradient(x: jax.Array, gradient: jax.Array, size: tuple[int, int], padding: Padding) -> jax.Array:
    """Gradient of the kernel of a convolution with stride 1.

    Args:
      x: Input (N, H, W, C) of the convolution.
      gradient: Gradient (N, H', W', D) of its output.
      size: Rows and columns (h, w) of the kernel.
      padding: (pixels before, pixels after) of H and W, not negative.

    Returns:
      The gradient (h, w, C, D).
    """
    images, height, width, channels = gradient.shape
    if size == (1, 1):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return jnp.einsum("nhwc,nhwd->cd", x, gradient)[None, None]
    # Enough pixels that adding a product to the sum of the others costs less than the product.
    needed = max(_LEAST_PIXELS, size[1] * x.shape[-1], size[0] * channels)
    part = next(n for n in range(1, images + 1) if images % n == 0 and (n * height * width >= needed or n == images))
    if part == images:
        return _of_part(x, gradient, size, padding)

    def parts(a: jax.Array) -> jax.Array:
        return a.reshape(images // part, part, *a.shape[1:])

    def add(total: jax.Array, some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _of_part(some[0], some[1], size, padding), None

    # In `jax.shard_map` the sum's type has the axes along which it varies. This product is not computed.
    zeros = jnp.zeros_like(_of_part(x[:part], gradient[:part], size, padding))
    return lax.scan(add, zeros, (parts(x), parts(gradient)))[0]


def _of_part(x: jax.Array, gradient: jax.Array, size: tuple[int, int], padding: Padding) -> jax.Array:
    """As `kernel_gradient`, with one matrix product: row r of the input meets row r - i of the output for all i."""
    rows, columns = size
    *_, width, channels = gradient.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height = x.shape[1]
    gradient = jnp.pad(gradient, ((0, 0), (rows - 1, rows - 1), (0, 0), (0, 0)))
    along_columns = jnp.concatenate([x[:, :, j : j + width] for j in range(columns)], -1)
    along_rows = jnp.concatenate([gradient[:, rows - 1 - i : rows - 1 - i + height] for i in range(rows)], -1)
    product = jnp.einsum("nhwa,nhwb->ab", along_columns, along_rows)
    return product.reshape(columns, x.shape[-1], rows, channels).transpose(2, 0, 1, 3)
