"""The performance prediction network PN of NPPM, which predicts the accuracy of a sub-network from its gates.

Every variant maps gates (N, Σ C_l), concatenated over l, to logits (N,). The predicted accuracy is the sigmoid of the
logit. The caller computes it, because log(sigmoid(x)) is numerically stable only as a single function.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddnp_jax.methods.ddnp.generators import gru_cell, weight_norm
from ddnp_jax.methods.masks import split_gates


class Predictor(nn.Module):
    """PN of NPPM Table 2: FC_l(C_l, 16), batch norm, ReLU; GRU(16, 16) over the gates; average; FC(16, 1).

    Batch normalization has separate statistics for every gate and feature.

    Attributes:
      widths: C_l, channels per gate.
    """

    widths: Sequence[int]
    features: int = 16

    @nn.compact
    def __call__(self, gates: jax.Array, train: bool = False) -> jax.Array:
        """Maps gates (N, Σ C_l) to logits (N,); in training mode with the statistics of the batch."""
        parts = split_gates(gates, self.widths)
        x = jnp.stack([nn.Dense(self.features, name=f"fc{gate}")(part) for gate, part in enumerate(parts)], axis=1)
        axes: Any = (1, 2)  # flax accepts several axes, although its type annotation does not say so
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis=axes, momentum=0.9)(x))
        states: Any = nn.RNN(gru_cell(self.features, "gru"))(x)  # an array, because `return_carry` is False
        x = jnp.mean(states, axis=1)
        return nn.Dense(1, name="head")(x)[:, 0]


class AuthorsPredictor(nn.Module):
    """PN of the authors' published code, wider than Table 2.

    Weight-normalized FC_l(C_l, 128), layer norm, ReLU; the last states of a bidirectional GRU(128, 64); FC(128, 1).

    Attributes:
      widths: C_l, channels per gate.
    """

    widths: Sequence[int]
    features: int = 128

    @nn.compact
    def __call__(self, gates: jax.Array, train: bool = False) -> jax.Array:
        """Maps gates (N, Σ C_l) to logits (N,); both modes are the same."""
        del train
        parts = split_gates(gates, self.widths)
        dense = [weight_norm(nn.Dense(self.features), name=f"fc{gate}")(part) for gate, part in enumerate(parts)]
        x = nn.relu(nn.LayerNorm()(jnp.stack(dense, axis=1)))
        last = [
            nn.RNN(gru_cell(self.features // 2, name), return_carry=True, reverse=reverse)(x)[0]
            for name, reverse in (("forward_gru", False), ("backward_gru", True))
        ]
        return nn.Dense(1, name="head")(jnp.concatenate(last, axis=-1))[:, 0]


class LinearRegression(nn.Module):
    """Linear regression, LR of NPPM suppl. Fig. 1: a linear function of all gates.

    Attributes:
      widths: C_l, channels per gate.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, gates: jax.Array, train: bool = False) -> jax.Array:
        """Maps gates (N, Σ C_l) to logits (N,); both modes are the same."""
        del train
        return nn.Dense(1, name="head")(gates)[:, 0]


PREDICTORS = {"gru": Predictor, "authors": AuthorsPredictor, "linear": LinearRegression}
