"""Prunes a custom flax.linen network: train, prune to half of the FLOPs, fine-tune, save, load.

Needs scikit-learn, for its digits; a minute or two on two CPU cores.
"""

import flax.linen as nn
import jax
import numpy as np
from sklearn.datasets import load_digits

import ddnp_jax

# Scalars instead of DDNP's generators need only a few hundred steps; generators need 2,000.
RATE = {"learning_rate": 0.05}
SCALARS = {"importance": "scalar", "width": "scalar", "importance_optimizer": RATE, "width_optimizer": RATE}


class Network(nn.Module):
    """An ordinary network without any pruning code."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, 8, 8, 1) to logits (N, 10)."""
        for i, features in enumerate((16, 32, 32, 64, 64, 64)):
            x = nn.Conv(features, (3, 3), strides=2 if i in (2, 4) else 1, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


scans = load_digits()
order = np.random.default_rng(0).permutation(len(scans.target))
images, labels = np.float32(scans.images[order, ..., None] / 16), scans.target[order]
batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 1408, 64)]
held_out = [(images[1408:], labels[1408:])]


def accuracy(model: nn.Module, variables: dict) -> str:
    """Top-1 accuracy on the held-out images."""
    return f"{ddnp_jax.evaluate(model, variables, held_out)['top1']:.1f} %"


model = Network()
base = ddnp_jax.fit(model, model.init(jax.random.key(0), images[:1]), batches, steps=220, learning_rate=0.1)
print("base:", accuracy(model, base.variables))

pruned = ddnp_jax.prune(model, base.variables, batches, p=0.5, steps=200, **SCALARS)
print("cut:", accuracy(pruned.model, pruned.variables))
tuned = ddnp_jax.fit(pruned.model, pruned.variables, batches, steps=110, learning_rate=0.05)
print("fine-tuned:", accuracy(tuned.model, tuned.variables))
print(pruned)

ddnp_jax.save_pruned("pruned_linen", tuned.model, tuned.variables)
print("loaded again:", accuracy(*ddnp_jax.load_pruned("pruned_linen", model=model)))
