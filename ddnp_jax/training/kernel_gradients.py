"""Gradients of convolution kernels on a CPU, as matrix products of small parts of a batch.

XLA:CPU computes such a gradient as a convolution whose window is the entire map, which mostly takes 1.5 to 4 times as
long as the convolution itself (docs/performance.md). Here a few images at a time are copied, shifted along the columns,
and their gradients shifted along the rows, so that one matrix product, whose operands are still in the processor's
cache, holds the products of all entries of the kernel. Other platforms keep XLA's form.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ddnp_jax.interpreter import Interpreter, evaluate
from ddnp_jax.topology import jaxprs

_LEAST_PIXELS = 256  # of a matrix product: with fewer, adding up its results takes longer than computing them


def with_fast_kernel_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function, for which reverse-mode differentiation is faster on a CPU.

    Only gradients of kernels of float32 convolutions over two dimensions with stride 1 are computed differently: not
    of grouped or dilated ones, nor of those inside loops, branches and functions with derivatives of their own. The
    result differs by rounding.

    Args:
      function: A function of arrays that JAX can trace.
    """

    def run(*args: Any) -> Any:
        return evaluate(function, _FastKernelGradients(), *args)

    return run


class _FastKernelGradients(Interpreter):
    """Gives convolutions another derivative."""

    def _is_unchanged(self, first: int, end: int) -> bool:
        return first == end  # no convolution or matrix product

    def _enter(self, eqn: core.JaxprEqn, program: Any, operands: list[Any], first: int) -> list[Any]:
        if eqn.primitive.name in jaxprs.DIFFERENTIATED:
            return super().compute(program[0], eqn, operands)
        return super()._enter(eqn, program, operands, first)

    def compute(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        """Computes one equation."""
        return [_convolve(eqn, *operands)] if _is_covered(eqn) else super().compute(jaxpr, eqn, operands)


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
        "dimension_numbers": lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),  # NHWC, HWIO, NHWC
    }
    return (
        all(given[name] == value for name, value in covered.items())
        and min(map(min, given["padding"])) >= 0
        # On lower maps, most rows of the matrix product would be padding.
        and jaxprs.shape_of(eqn.outvars[0])[1] >= jaxprs.shape_of(eqn.invars[1])[0]
        and all(jaxprs.dtype_of(atom) == jnp.float32 for atom in (*eqn.invars, *eqn.outvars))
    )


def _convolve(eqn: core.JaxprEqn, x: jax.Array, kernel: jax.Array) -> jax.Array:
    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return eqn.primitive.bind(x, kernel, **eqn.params)

    def native_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: native(x, kernel), kernel)(gradient)[0]

    def on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return kernel_gradient(x, gradient, (kernel.shape[0], kernel.shape[1]), eqn.params["padding"])

    def backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = saved
        (of_x,) = jax.linear_transpose(lambda x: native(x, kernel), x)(gradient)
        return of_x, lax.platform_dependent(x, gradient, cpu=on_cpu, default=native_gradient)

    convolve = jax.custom_vjp(native)
    convolve.defvjp(lambda x, kernel: (native(x, kernel), (x, kernel)), backward)
    return convolve(x, kernel)


def kernel_gradient(
    x: jax.Array, gradient: jax.Array, size: tuple[int, int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
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

    return lax.scan(add, jnp.zeros((*size, x.shape[-1], channels), x.dtype), (parts(x), parts(gradient)))[0]


def _of_part(x: jax.Array, gradient: jax.Array, size: tuple[int, int], padding: Sequence[tuple[int, int]]) -> jax.Array:
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
