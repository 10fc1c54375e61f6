"""The building blocks in a custom loop, on a plain function: trace, score, fit to a budget, prune, verify, train.

Needs scikit-learn, for its digits; about 20 seconds on two CPU cores.
"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import ddnp_jax

scans = load_digits()
order = np.random.default_rng(0).permutation(len(scans.target))
x, y = np.float32(scans.images[order, ..., None] / 16), scans.target[order]
NHWC = ("NHWC", "HWIO", "NHWC")


def network(params: dict, x: jax.Array) -> jax.Array:
    """Maps images (N, 8, 8, 1) to logits (N, 10)."""
    for name in ("conv0", "conv1", "conv2"):
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=NHWC))
    return x.mean((1, 2)) @ params["classifier"]


def loss(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(params: dict, steps: int) -> dict:
    """An ordinary training loop without any pruning code."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))
    gradient = jax.jit(jax.grad(lambda params, x, y: loss(network(params, x), y)))
    state = optimizer.init(params)
    for i in range(steps):
        batch = np.arange(64 * i, 64 * i + 64) % 1408
        updates, state = optimizer.update(gradient(params, x[batch], y[batch]), state, params)
        params = optax.apply_updates(params, updates)
    return params


shapes = {"conv0": (3, 3, 1, 16), "conv1": (3, 3, 16, 32), "conv2": (3, 3, 32, 32), "classifier": (32, 10)}
he_normal = jax.nn.initializers.he_normal()
params = train({name: he_normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}, steps=300)

# A custom score: how much the loss changes with a channel's mask, from the gradient at masks of 1.
topology = ddnp_jax.trace(network, (8, 8, 1), variables=params)
ones = [np.ones(width, np.float32) for width in topology.widths]
scores = jax.grad(lambda masks: loss(ddnp_jax.apply_masked(network, params, x[:1408], masks, topology), y[:1408]))(ones)
widths = ddnp_jax.Budget(topology, p=0.5).fit([1.0] * len(scores))
order = (np.argsort(-np.abs(score)).tolist() for score in scores)
selection = ddnp_jax.Selection(tuple(tuple(sorted(o[:width])) for o, width in zip(order, widths, strict=True)))
_, cut = ddnp_jax.compact(network, params, selection, topology)
print(ddnp_jax.verify(network, params, network, cut, selection, topology, x[:64]))
tuned = train(cut, steps=200)
for name, each in (("base", params), ("cut", cut), ("fine-tuned", tuned)):
    print(f"{name}: {100 * np.mean(network(each, x[1408:]).argmax(1) == y[1408:]):.1f} %")
print(f"FLOPs: {ddnp_jax.flops.total(topology):,} -> {ddnp_jax.flops.total(topology, widths):,}")
ddnp_jax.save_pruned("pruned_own_loop", network, tuned)
