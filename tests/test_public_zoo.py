"""Networks of other authors are traced, pruned, verified, saved and loaded, without code to rebuild them."""

import contextlib
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

ROUNDING = {"half precision": 2e-2}  # relative to the largest output, where it is not that of float32

names = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not network.available, reason=f"needs {network.needs}"))
        for name, network in NETWORKS.items()
    ],
)


@pytest.fixture(autouse=True)
def settings():
    """Allows adding (C,) to (N, H, W, C), as public code does, and reduces the time for compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def traced(name):
    model, variables = NETWORKS[name].build()
    return model, variables, ddnp_jax.trace(model, SHAPE, **only_of_functions(model, variables=variables))


def only_of_functions(model, **kwargs):
    """Modules know the structure of their variables."""
    return {} if isinstance(model, nn.Module | nnx.Module) else kwargs


@functools.cache
def cut(name):
    """The network, pruned to random channels."""
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
    run = jax.jit(lambda v, x: public_zoo.run(NETWORKS[name], model, v, x))
    return jax.tree.map(lambda each: np.asarray(each, np.float32), jax.tree.leaves(run(variables, images())))


@functools.cache
def cut_outputs(name):
    return outputs(name, *cut(name)[2:4])


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
    masked = jax.jit(lambda v, masks: ddnp_jax.apply_masked(model, v, images(), masks, topology))
    whole = outputs(name, model, variables)
    for kind in ("random", "one", "all"):
        selection = selection_of(topology, kind)
        expected = jax.tree.map(np.asarray, jax.tree.leaves(masked(variables, selection.masks(topology))))
        if kind == "random":
            found = cut_outputs(name)
        elif selection.widths == topology.widths:
            found = whole
        else:
            found = outputs(name, *ddnp_jax.compact(model, variables, selection, topology))
        assert all(np.isfinite(each).all() and np.ptp(each) > 0 for each in found)
        assert close(name, found, expected)
        assert close(name, found, whole) == (selection.widths == topology.widths)


@names
def test_keeping_everything_changes_nothing(name):
    model, variables, topology = traced(name)
    small_model, small_variables = ddnp_jax.compact(model, variables, selection_of(topology, "all"), topology)
    before, after = (nnx.state(m) if v is None else v for m, v in ((model, variables), (small_model, small_variables)))
    jax.tree.map(np.testing.assert_array_equal, without_keys(after), without_keys(before))


def without_keys(variables):
    return [leaf for leaf in jax.tree.leaves(variables) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


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
    for found, wanted in zip(outputs(name, *loaded), cut_outputs(name), strict=True):
        np.testing.assert_array_equal(found, wanted)


@names
def test_the_smaller_network_is_traced_and_cut_again(name):
    _, _, model, variables, selection, whole = cut(name)
    topology = ddnp_jax.trace(model, SHAPE, **only_of_functions(model, variables=variables))
    assert ddnp_jax.flops.total(topology) == ddnp_jax.flops.total(whole, selection.widths)
    second = selection_of(topology, "random", seed=1)
    small_model, small_variables = ddnp_jax.compact(model, variables, second, topology)
    ddnp_jax.verify(model, variables, small_model, small_variables, second, topology, images())


def test_a_shortcut_that_only_the_smaller_network_has_is_refused():
    model = public_zoo.ShortcutWhereShapesAgree()
    variables = public_zoo.drawn(jax.eval_shape(model.init, jax.random.key(0), images()))
    topology = ddnp_jax.trace(model, SHAPE)
    assert topology.widths == (6, 8)
    for kept, equal in ((((0, 2, 3), (1, 4, 5, 7)), False), (((0, 2, 3), (1, 4, 5)), True)):
        selection = ddnp_jax.Selection(kept)
        with pytest.raises(ValueError) if equal else contextlib.nullcontext():
            small = ddnp_jax.compact(model, variables, selection, topology)
            ddnp_jax.verify(model, variables, *small, selection, topology, images())


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
        assert close(name, list(found.values()), cut_outputs(name))
