"""Parameterizations of importance and width: the generators g_s and g_k, scalar parameters, and fixed values.

Importance modules take no input and return a tuple of per-gate scores s̄_l (C_l,); width modules take no input and
return the fractions k (L,). Learned variables are in the collection "params", fixed variables in "inputs".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH_SHIFT = 3.0  # b of DDNP eq. (2): the search starts from an almost unpruned network


def weight_norm(layer: nn.Module, name: str | None = None) -> nn.WeightNorm:
    """Weight-normalizes a layer: `w = g v / ||v||` for every column of its kernels."""
    return nn.WeightNorm(layer, variable_filter={"kernel"}, name=name)


def _inputs(module: nn.Module, init: nn.initializers.Initializer, shape: tuple[int, ...], learned: bool) -> jax.Array:
    """The generator's input: a parameter if it is learned, otherwise random and constant during the search."""
    if learned:
        return module.param("x", init, shape)
    return module.variable("inputs", "x", lambda: init(module.make_rng("params"), shape, jnp.float32)).value


def gru_cell(features: int, name: str | None = None) -> nn.GRUCell:
    """A GRU with a normal initialization of its recurrent kernels.

    XLA's fusions on CPU cannot compile flax's default, the orthogonal initialization.
    """
    return nn.GRUCell(features, recurrent_kernel_init=nn.initializers.lecun_normal(), name=name)


class _GRU(nn.Module):
    """One step of a weight-normalized GRU."""

    hidden: int

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weight_norm(gru_cell(self.hidden))(carry, x)


class ImportanceGenerator(nn.Module):
    """g_s (DDNP Table A2): GRU(64, 128) scanned over the gates, eq. (1), ReLU, FC_l(128, C_l), all weight-normalized.

    Attributes:
      widths: C_l, channels per gate.
      learned_inputs: Whether the inputs x_s (L, 64), random rows of about unit length, are learned (Fig. A1 e).
      bidirectional: Whether a second GRU runs from the last gate to the first (in the authors' code, not in Table A2).
      layer_norm: Whether the GRU's outputs are layer-normalized (in the authors' code, not in Table A2).
    """

    widths: Sequence[int]
    learned_inputs: bool = False
    bidirectional: bool = False
    layer_norm: bool = False
    features: int = 64
    hidden: int = 128

    @nn.compact
    def __call__(self) -> tuple[jax.Array, ...]:
        """Returns s̄_l, (C_l,) per gate."""
        x = _inputs(
            self, nn.initializers.normal(self.features**-0.5), (len(self.widths), self.features), self.learned_inputs
        )
        outputs = self._scan(x, reverse=False)
        if self.bidirectional:
            outputs = jnp.concatenate([outputs, self._scan(x, reverse=True)], axis=-1)
        if self.layer_norm:
            outputs = nn.LayerNorm()(outputs)
        outputs = nn.relu(outputs)
        return tuple(
            weight_norm(nn.Dense(channels), name=f"fc{gate}")(outputs[gate])
            for gate, channels in enumerate(self.widths)
        )

    def _scan(self, x: jax.Array, reverse: bool) -> jax.Array:
        cell = nn.scan(_GRU, variable_broadcast="params", split_rngs={"params": False}, reverse=reverse)
        name = "backward_gru" if reverse else "gru"
        return cell(self.hidden, name=name)(jnp.zeros(self.hidden), x)[1]


class ScalarImportance(nn.Module):
    """One parameter per channel, "channel-wise-ks" of DDNP Fig. A1 (d)."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, ...]:
        """Returns s̄_l, (C_l,) per gate."""
        init = nn.initializers.normal(0.01)  # initial values differ between channels, so the first ranking is random
        return tuple(self.param(f"s{gate}", init, (channels,)) for gate, channels in enumerate(self.widths))


class WidthGenerator(nn.Module):
    """g_k (DDNP Table A3) and eq. (2): FC(32, 64), ReLU, FC(64, L), weight-normalized; k = sigmoid(k̄ + 3).

    Attributes:
      gates: Number of gates L.
      learned_inputs: Whether the input x_k (32) is learned.
    """

    gates: int
    learned_inputs: bool = False
    features: int = 32
    hidden: int = 64

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns k, (L,) in (0, 1)."""
        x = _inputs(self, nn.initializers.normal(1.0), (self.features,), self.learned_inputs)
        x = nn.relu(weight_norm(nn.Dense(self.hidden), name="fc1")(x))
        return nn.sigmoid(weight_norm(nn.Dense(self.gates), name="fc2")(x) + WIDTH_SHIFT)


class LinearWidth(nn.Module):
    """g_k of the authors' published code: k = sigmoid(W x + 3), with random x (L) and a single layer W (L, L).

    Table A3 has two layers. W is initialized like PyTorch's linear layers.

    Attributes:
      gates: Number of gates L.
      learned_inputs: Whether the input x is learned.
    """

    gates: int
    learned_inputs: bool = False

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns k, (L,) in (0, 1)."""
        x = _inputs(self, nn.initializers.normal(1.0), (self.gates,), self.learned_inputs)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(L) of 0
        return nn.sigmoid(nn.Dense(self.gates, use_bias=False, kernel_init=init, name="fc")(x) + WIDTH_SHIFT)


class ScalarWidth(nn.Module):
    """One parameter per gate; k = sigmoid(k̄ + 3)."""

    gates: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns k, (L,) in (0, 1)."""
        return nn.sigmoid(self.param("k", nn.initializers.zeros, (self.gates,)) + WIDTH_SHIFT)


class Learner(NamedTuple):
    """A parameterization as two pure functions.

    Attributes:
      init: Random key -> {"params": learned variables, "inputs": fixed variables}; either may be missing.
      apply: These variables -> the value.
    """

    init: Callable[[jax.Array], Mapping[str, Any]]
    apply: Callable[[dict], Any]


def fixed(value: Any) -> Learner:
    """A constant value: L1-norm importance ("Fix S") or width 0.5 ("Fix k") of DDNP Fig. A1 (d)."""
    return Learner(init=lambda rng: {}, apply=lambda variables: value)


def learned(module: nn.Module) -> Learner:
    """Wraps one of the modules above as a learner."""
    return Learner(init=module.init, apply=module.apply)
