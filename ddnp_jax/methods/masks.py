"""From importance and width to masks: ranking, soft top-k, relaxed Bernoulli gates, straight-through rounding."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

GATE_SHIFT = 3.0  # keeps every gate open at the start of a search
GATE_TEMPERATURE = 0.4
# Logits from which a relaxed Bernoulli gate is open more often than not: -3.3665, as the noise has the median 0.3665.
OPEN_FROM = math.log(math.log(2)) - GATE_SHIFT


def ranks(importance: jax.Array) -> jax.Array:
    """Rank of every channel, 0 for the most important; equal importances keep channel order.

    Args:
      importance: (C,).

    Returns:
      (C,) int32, a permutation of 0..C-1.
    """
    order = jnp.argsort(-importance, stable=True)
    return jnp.argsort(order, stable=True).astype(jnp.int32)


def hard_top_k(count: jax.Array | int, ranks: jax.Array) -> jax.Array:
    """Mask of ones for the `count` best-ranked channels, (C,) float32."""
    return (ranks < count).astype(jnp.float32)


def _smooth_step(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -0.5, 0.5)
    return -2.0 * x**3 + 1.5 * x + 0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def soft_top_k(k: jax.Array, ranks: jax.Array, band: float = 0.05, floor: float = 0.0) -> jax.Array:
    """Soft mask of the k * C best-ranked channels of the DDNP search.

    The mask falls from 1 to 0 as a cubic within r = floor(band * C) ranks on either side of K = k * C; the band is
    narrowed to stay inside [0, C), and r = 0 is the hard top-k with round(K) ones. `floor` is added and the sum clipped
    at 1, so that removed channels keep a gradient.

    The gradient with respect to k is the mean over channels of the mask's gradient, a straight-through estimate of
    "one more channel"; there is none with respect to the ranks.

    Args:
      k: Scalar in [0, 1], the fraction of channels to keep.
      ranks: (C,) int, 0 for the most important channel.
      band: Half-width of the soft edge as a fraction of C.
      floor: Smallest value of the mask.

    Returns:
      (C,) float32 mask in channel order.
    """
    channels = ranks.shape[0]
    kept = k * channels
    half_width = jnp.minimum(jnp.floor(band * channels), jnp.minimum(kept, channels - kept))
    soft = _smooth_step((kept - ranks) / jnp.where(half_width > 0, 2.0 * half_width, 1.0))
    mask = jnp.where(half_width > 0, soft, hard_top_k(jnp.round(kept), ranks))
    return jnp.minimum(mask + floor, 1.0)


def _soft_top_k_forward(k: jax.Array, ranks: jax.Array, band: float, floor: float) -> tuple[jax.Array, None]:
    return soft_top_k(k, ranks, band, floor), None


def _soft_top_k_backward(band: float, floor: float, _: None, gradient: jax.Array) -> tuple[jax.Array, None]:
    return jnp.mean(gradient), None


soft_top_k.defvjp(_soft_top_k_forward, _soft_top_k_backward)


def noisy(logits: jax.Array, rng: jax.Array | None) -> jax.Array:
    """`logits + g + 3` with g ~ Gumbel(0, 1); g = 0 without `rng`."""
    noise = 0.0 if rng is None else jax.random.gumbel(rng, logits.shape, logits.dtype)
    return logits + noise + GATE_SHIFT


def relaxed(noisy: jax.Array) -> jax.Array:
    """Relaxed Bernoulli gates of what `noisy` returns: `sigmoid((logits + g + 3) / 0.4)`."""
    return jax.nn.sigmoid(noisy / GATE_TEMPERATURE)


def relaxed_bernoulli(logits: jax.Array, rng: jax.Array | None) -> jax.Array:
    """Relaxed Bernoulli gates `sigmoid((logits + g + 3) / 0.4)` with g ~ Gumbel(0, 1); g = 0 without `rng`."""
    return relaxed(noisy(logits, rng))


def open_probability(logits: jax.Array) -> jax.Array:
    """How often relaxed Bernoulli gates of these logits are at least 1/2: P(g >= -logits - 3)."""
    return -jnp.expm1(-jnp.exp(logits + GATE_SHIFT))


def straight_through(gates: jax.Array) -> jax.Array:
    """Rounds gates at 1/2 to zeros and ones; the gradient passes as if nothing was rounded."""
    hard = (gates >= 0.5).astype(gates.dtype)
    return gates + jax.lax.stop_gradient(hard - gates)


def split_gates(values: jax.Array, widths: Sequence[int]) -> tuple[jax.Array, ...]:
    """Divides the last axis (..., Σ C_l) into one array (..., C_l) per gate."""
    return tuple(jnp.split(values, np.cumsum(widths)[:-1], axis=-1))
