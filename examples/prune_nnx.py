"""Prunes a flax.nnx network; `residual=True` also prunes its residual stream.

Needs scikit-learn, for its digits; about 20 seconds on two CPU cores.
"""

import jax
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import ddnp_jax


class Block(nnx.Module):
    """Two convolutions, whose outputs are added to the input."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(x + self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class Network(nnx.Module):
    """Maps images (N, 8, 8, 1) to logits (N, 10)."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 32, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.Sequential(*[Block(32, rngs) for _ in range(3)])
        self.classifier = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.classifier(self.blocks(self.stem(x)).mean((1, 2)))


def accuracy(model: nnx.Module) -> str:
    """Top-1 accuracy on the held-out images."""
    return f"{ddnp_jax.evaluate(model, None, [(images[1408:], labels[1408:])])['top1']:.1f} %"


scans = load_digits()
order = np.random.default_rng(0).permutation(len(scans.target))
images, labels = np.float32(scans.images[order, ..., None] / 16), scans.target[order]
batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 1408, 64)]

# An nnx module holds its variables, so None is passed; it is not modified, and a new module is returned.
base = ddnp_jax.fit(Network(nnx.Rngs(0)), None, batches, steps=220, learning_rate=0.1)
pruned = ddnp_jax.prune(base.model, None, batches, p=0.5, method="taylor", residual=True)
tuned = ddnp_jax.fit(pruned.model, None, batches, steps=220, learning_rate=0.05)
print(f"base: {accuracy(base.model)}, cut: {accuracy(pruned.model)}, fine-tuned: {accuracy(tuned.model)}")
print(pruned)
ddnp_jax.save_pruned("pruned_nnx", tuned.model)
