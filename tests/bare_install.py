"""Prunes small networks with an installed ddnp_jax; test_wheel.py runs it where nothing but the wheel is installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import ddnp_jax

OTHERS = ("PIL", "cv2", "grain", "matplotlib", "ml_collections", "sklearn", "tensorflow_datasets", "torch", "tqdm")
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
BATCHES = [(IMAGES, np.arange(4))]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        features = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(images)))
        return nn.Dense(4)(nn.relu(nn.Conv(8, (3, 3))(features)).mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, images):
        return self.last(nnx.relu(self.norm(self.first(images))).mean((1, 2)))


def pruned(model, variables):
    """Prunes a network and checks that it has fewer channels; `prune` verifies the outputs itself."""
    found = ddnp_jax.prune(model, variables, BATCHES, method="magnitude")
    assert sum(found.selection.widths) < sum(ddnp_jax.trace(model, (8, 8, 3)).widths)
    return found


def main():
    """Raises an error if a module is missing or a result is wrong."""
    assert Path(ddnp_jax.__file__).is_relative_to(sys.prefix), ddnp_jax.__file__
    assert not [name for name in OTHERS if find_spec(name)]
    pruned(Nnx(nnx.Rngs(0)), None)
    model = Linen()
    small = pruned(model, model.init(jax.random.key(0), IMAGES))
    fitted = ddnp_jax.fit(small.model, small.variables, BATCHES, steps=1)
    ddnp_jax.save_pruned("small", fitted.model, fitted.variables)
    loaded, variables = ddnp_jax.load_pruned("small")
    np.testing.assert_array_equal(loaded.apply(variables, IMAGES), fitted.model.apply(fitted.variables, IMAGES))


if __name__ == "__main__":
    main()
