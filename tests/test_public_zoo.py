"""Networks of other people's making: traced, cut, verified, saved and loaded, with no word of how to build them."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import public_zoo
import pytest
from flax import nnx
from public_zoo import NETWORKS, SHAPE

import ddnp_jax

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # most of the time is compiling
ROUNDING = {"half precision": 2e-2}  # relative to the largest output, where it is not that of float32

names = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not network.available, reason=f"needs {network.needs}"))
        for name, network in NETWORKS.items()
    ],
)


@pytest.fixture(autouse=True)
def rank_promotion():
    """Public code adds (C,) to (N, H, W, C)."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def traced(name):
    model, variables = NETWORKS[name].build()
    return model, variables, ddnp_jax.trace(model, SHAPE, **only_of_functions(model, variables=variables))


def only_of_functions(model, **kwargs):
    """Modules know the structure of their variables."""
    return {} if isinstance(model, nn.Module | nnx.Module) else kwargs


@functools.cache
def cut(name):
    """The network, and a random part of it."""
    model, variables, topology = traced(name)
    selection = selection_of(topology, "random")
    return model, variables, *ddnp_jax.compact(model, variables, selection, topology), selection, topology


def selection_of(topology, kind, seed=0):
    rng = np.random.default_rng(seed)
    counts = {"all": lambda n: n, "one": lambda n: 1, "random": lambda n: int(rng.integers(1, max(n, 2)))}
    kept = [rng.choice(n, counts[kind](n), replace=False) for n in topology.widths]
    return ddnp_jax.Selection(tuple(tuple(sorted(map(int, each))) for each in kept))


def images(n=3):
    return np.random.default_rng(1).normal(size=(n, *SHAPE)).astype(np.float32)


def outputs(name, model, variables):
    """All outputs in evaluation mode, as a list of arrays."""
    run = jax.jit(lambda v, x: public_zoo.run(NETWORKS[name], model, v, x), compiler_options=FAST)
    return jax.tree.map(lambda each: np.asarray(each, np.float32), jax.tree.leaves(run(variables, images())))


def close(name, found, expected):
    limit = ROUNDING.get(name, 2e-5)
    assert len(found) == len(expected)
    return all(
        a.shape == b.shape and np.abs(a - b).max() <= limit * np.abs(b).max()
        for a, b in zip(found, expected, strict=True)
    )


@names
def test_what_is_free_is_found(name):
    network, (_, _, topology) = NETWORKS[name], traced(name)
    found = [gate.name for gate in topology.gates]
    assert [gate for gate in network.gates if gate not in found] == []
    assert len(found) >= network.count
    assert ddnp_jax.flops.prunable(topology) >= network.share * ddnp_jax.flops.total(topology)


@names
def test_cutting_is_masking(name):
    model, variables, topology = traced(name)
    masked = jax.jit(lambda v, masks: ddnp_jax.apply_masked(model, v, images(), masks, topology), compiler_options=FAST)
    whole = outputs(name, model, variables)
    for kind in ("random", "one", "all"):
        selection = selection_of(topology, kind)
        small = cut(name)[2:4] if kind == "random" else ddnp_jax.compact(model, variables, selection, topology)
        expected = jax.tree.map(np.asarray, jax.tree.leaves(masked(variables, selection.masks(topology))))
        found = outputs(name, *small)
        assert all(np.isfinite(each).all() and np.ptp(each) > 0 for each in found)
        assert close(name, found, expected)
        if topology.gates:
            assert close(name, found, whole) == (selection.widths == topology.widths)
    ddnp_jax.verify(*cut(name), images())


@names
def test_the_smaller_network_trains(name):
    network, (model, variables, small_model, small_variables, *_) = NETWORKS[name], cut(name)

    def train(model, variables):
        outputs, updated = jax.eval_shape(
            lambda v: public_zoo.run(network, model, v, images(), training=True), variables
        )
        return jax.tree.map(lambda each: each.shape, (outputs, updated))

    whole, small = train(model, variables), train(small_model, small_variables)
    assert whole[0] == small[0]
    assert jax.tree.structure(whole[1]) == jax.tree.structure(small[1])


@names
def test_saved_and_loaded(name, tmp_path):
    model, variables, small_model, small_variables, *_ = cut(name)
    ddnp_jax.save_pruned(tmp_path, small_model, small_variables)
    loaded = ddnp_jax.load_pruned(tmp_path, model=model, **only_of_functions(model, variables=variables))
    expected = outputs(name, small_model, small_variables)
    for found, wanted in zip(outputs(name, *loaded), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@names
def test_the_smaller_network_is_traced_and_cut_again(name):
    _, _, model, variables, selection, whole = cut(name)
    topology = ddnp_jax.trace(model, SHAPE, **only_of_functions(model, variables=variables))
    assert ddnp_jax.flops.total(topology) == ddnp_jax.flops.total(whole, selection.widths)
    second = selection_of(topology, "random", seed=1)
    small_model, small_variables = ddnp_jax.compact(model, variables, second, topology)
    ddnp_jax.verify(model, variables, small_model, small_variables, second, topology, images())


LOAD = """
import sys
import jax, numpy as np
import ddnp_jax, public_zoo
name, folder, images, outputs = sys.argv[1:]
network = public_zoo.NETWORKS[name]
made = network.make()
whole = dict(model=made[0], variables=made[1]) if isinstance(made, tuple) else dict(model=made)
model, variables = ddnp_jax.load_pruned(folder, **whole)
run = jax.jit(lambda v, x: public_zoo.run(network, model, v, x))
np.savez(outputs, *jax.tree.leaves(run(variables, np.load(images))))
"""


@pytest.mark.parametrize("name", ["resnet, bottlenecks", "nnx mobilenet", "function"])
def test_a_fresh_process_loads_it(tmp_path, name):
    _, _, small_model, small_variables, *_ = cut(name)
    ddnp_jax.save_pruned(tmp_path / "pruned", small_model, small_variables)
    np.save(tmp_path / "x.npy", images())
    tests = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", LOAD, name, tmp_path / "pruned", tmp_path / "x.npy", tmp_path / "y.npz"],
        check=True,
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )
    with np.load(tmp_path / "y.npz") as found:
        assert close(name, list(found.values()), outputs(name, small_model, small_variables))
