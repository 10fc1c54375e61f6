"""Every method's search of one small network, with XLA's fusions on; test_cpu.py starts it and compares.

Prints as JSON what each method found.
"""

import json

import flax.linen as nn
import jax
import numpy as np

import ddnp_jax
from ddnp_jax import methods
from ddnp_jax.cost.budget import Budget

SHAPE = (8, 8, 3)
# As many as an image has pixels, and more; XLA does not fuse what is smaller, so that with fewer all would compile.
WIDTHS = (64, 96)
FIELDS = {"ddnp": {"importance": "scalar", "width": "scalar"}, "nppm": {"predictor": "none"}}


class Convolutional(nn.Module):
    """Every method can score its gates: they have a normalization and are read as maps."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, 8, 8, 3) to logits (N, 5)."""
        for i, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x))
        return nn.Conv(5, (1, 1), name="classes")(x).mean((1, 2))


def found() -> dict[str, list[list[float]]]:
    """The importances that each method has after two batches, per gate."""
    rng = np.random.default_rng(0)
    batches = [(np.float32(rng.normal(size=(4, *SHAPE))), rng.integers(0, 5, 4)) for _ in range(2)]
    model = Convolutional()
    variables = jax.jit(model.init)(jax.random.key(0), batches[0][0])
    topology = ddnp_jax.trace(model, SHAPE)
    importances = {}
    for name in (name for name in methods.METHODS if name != "stored"):
        config = methods.configure(name, FIELDS.get(name))
        search = methods.build(name, methods.Problem(model, variables, topology, Budget(topology, 0.5), config, 2))
        state, _ = methods.run_search(search, variables, batches, progress=False)
        importances[name] = [np.asarray(each).tolist() for each in search.propose(state)[0]]
    return importances


if __name__ == "__main__":
    ddnp_jax.configure_cpu()
    print(json.dumps(found()))
