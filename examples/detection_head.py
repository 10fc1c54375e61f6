"""Prunes a network with dense outputs and a custom loss: a small detector of squares in noise.

About 30 seconds on two CPU cores.
"""

import flax.linen as nn
import jax
import numpy as np
import optax

import ddnp_jax


class Detector(nn.Module):
    """A backbone and two heads: the center of a square, and its size."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Maps images (N, 32, 32, 1) to maps of logits (N, 8, 8) and sizes (N, 8, 8)."""
        for i, features in enumerate((16, 32, 32, 32)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=1 + i % 2, name=f"conv{i}")(x))
        heads = {name: nn.relu(nn.Conv(32, (3, 3), name=f"{name}_hidden")(x)) for name in ("middle", "size")}
        return {name: nn.Conv(1, (1, 1), name=name)(hidden)[..., 0] for name, hidden in heads.items()}


def loss(outputs: dict[str, jax.Array], targets: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of the cells, and the absolute error of the size in the center's cell."""
    cells = optax.softmax_cross_entropy(outputs["middle"], targets["middle"], axis=(1, 2))
    errors = targets["middle"] * abs(outputs["size"] - targets["size"][:, None, None])
    return (cells + errors.sum((1, 2))).mean()


def squares(count: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images of one square each in noise, with the cell of its center and its size in cells."""
    rng = np.random.default_rng(seed)
    images, cells = rng.normal(0, 0.5, (count, 32, 32, 1)), np.zeros((count, 8, 8))
    sides, middles = rng.integers(3, 11, count), rng.integers(6, 26, (count, 2))
    for image, cell, side, (y, x) in zip(images, cells, sides, middles, strict=True):
        image[y - side // 2 :, x - side // 2 :][:side, :side] += 1
        cell[y // 4, x // 4] = 1
    return images, {"middle": cells, "size": sides / 4}


def found(model: nn.Module, variables: dict) -> str:
    """The loss on new images, and the fraction of them whose cell is correct."""
    images, targets = squares(256, seed=1000)
    outputs = model.apply(variables, images)
    cells, right = (each["middle"].reshape(-1, 64).argmax(1) for each in (outputs, targets))
    return f"loss {loss(outputs, targets):.3f}, {100 * np.mean(cells == right):.1f} % of the middles found"


model, batches = Detector(), [squares(64, seed) for seed in range(30)]
base = ddnp_jax.fit(model, model.init(jax.random.key(0), batches[0][0]), batches, steps=200, loss=loss)
pruned = ddnp_jax.prune(model, base.variables, batches, p=0.5, method="taylor", steps=30, loss=loss)
tuned = ddnp_jax.fit(pruned.model, pruned.variables, batches, steps=100, loss=loss)
for name, each in (("base", base), ("cut", pruned), ("fine-tuned", tuned)):
    print(f"{name}: {found(each.model, each.variables)}")
print(pruned)
ddnp_jax.save_pruned("pruned_detector", tuned.model, tuned.variables)
