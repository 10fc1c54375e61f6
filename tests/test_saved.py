"""Saved networks: loaded variables equal the saved ones exactly, and damaged or malicious files are refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax.serialization import msgpack_serialize
from test_compact import CASES, apply, images, selection_of

from ddnp_jax import files, models
from ddnp_jax.compact import compact
from ddnp_jax.saved import load_pruned, save_pruned
from ddnp_jax.topology import trace

SHAPE = (8, 8, 3)

LOAD = """
import sys
import zoo
import jax
import numpy as np
from ddnp_jax.saved import load_pruned
model, variables = load_pruned(sys.argv[1])
x = np.load(sys.argv[2])
np.save(sys.argv[3], jax.jit(model.apply)(variables, x))
"""


@pytest.mark.parametrize("name", ["resnet20 avgpool", "vgg"])
def test_a_fresh_process_loads_it_in_one_call(tmp_path, name):
    model, _, rebuild = CASES[name]
    variables, topology = zoo.randomized(model, SHAPE), trace(model, SHAPE)
    small_model, small = compact(model, variables, selection_of(topology, "random"), topology, rebuild)
    save_pruned(tmp_path / "pruned", small_model, small)
    np.save(tmp_path / "x.npy", images())
    command = [sys.executable, "-c", LOAD, tmp_path / "pruned", tmp_path / "x.npy", tmp_path / "y.npy"]
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    subprocess.run(command, check=True, env=environment)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), apply(small_model, small, images()))


def test_saving_again_replaces_and_data_types_stay(tmp_path):
    model = models.create("resnet20", 7, widths=(1, 2, 3, 4, 5, 6, 7, 8, 9), dtype=jnp.bfloat16)
    variables = zoo.randomized(model, SHAPE)
    save_pruned(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, variables))
    save_pruned(tmp_path, model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables))
    assert len(list(tmp_path.iterdir())) == 2
    loaded_model, loaded = load_pruned(tmp_path)
    assert loaded_model == model
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    for leaf, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, expected.astype(jnp.bfloat16))


def test_an_interrupted_save_leaves_the_old_network(tmp_path, monkeypatch):
    model = zoo.Sorted()
    variables = zoo.randomized(model, SHAPE)
    save_pruned(tmp_path, model, variables)
    replace = os.replace

    def fail(source, target):
        if Path(target).name == "model.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, variables))
    _, loaded = load_pruned(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_attributes_that_cannot_be_written_need_the_model(tmp_path):
    model = zoo.Middle(zoo.grouped)
    variables = zoo.randomized(model, SHAPE)
    save_pruned(tmp_path, model, variables)
    with pytest.raises(ValueError, match=r"lacks the attributes middle of zoo:Middle; pass the unpruned network"):
        load_pruned(tmp_path)
    loaded_model, loaded = load_pruned(tmp_path, model=model)
    assert loaded_model is model
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_a_model_with_other_attributes_is_refused(tmp_path):
    model = models.create("resnet20", 7, shortcut="avgpool")
    save_pruned(tmp_path, model, zoo.randomized(model, SHAPE))
    for same in (model, model.clone(dtype=jnp.bfloat16)):
        assert load_pruned(tmp_path, model=same)[0] == same
    with pytest.raises(ValueError, match=r"holds a network with shortcut='avgpool', and the model has its default"):
        load_pruned(tmp_path, model=models.create("resnet20", 7))  # without parameters: the weights would fit


def test_a_network_of_this_library_is_loaded_given_the_unpruned_one(tmp_path):
    model = models.create("resnet20", 7)
    small = model.clone(widths=(5, 6, 7, 8, 9, 10, 11, 12, 13))
    variables = zoo.randomized(small, SHAPE)
    save_pruned(tmp_path, small, variables)
    loaded_model, loaded = load_pruned(tmp_path, model=model.clone(dtype=jnp.bfloat16))
    assert loaded_model == small.clone(dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


class WithDefault(nn.Module):
    """A network with an attribute that may equal its default without being the same object."""

    features: tuple[int, ...] = (6, 5)

    @nn.compact
    def __call__(self, x):
        for count in self.features:
            x = nn.relu(nn.Conv(count, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_default_that_was_given_is_the_default(tmp_path):
    given = WithDefault(tuple([6, 5]))  # equal, not the same
    save_pruned(tmp_path, given, zoo.randomized(given, SHAPE))
    assert json.loads((tmp_path / "model.json").read_text())["attributes"] == {}
    assert load_pruned(tmp_path, model=WithDefault())[0] == WithDefault()
    with pytest.raises(ValueError, match=r"holds a network with features=its default, and the model has \[6, 4\]"):
        load_pruned(tmp_path, model=WithDefault((6, 4)))


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.json does not exist"):
        load_pruned(tmp_path / "nothing")
    model = zoo.Sorted()
    save_pruned(tmp_path / "run" / "pruned", model, zoo.randomized(model, SHAPE))
    with pytest.raises(ValueError, match=r"run/model\.json does not exist; give .*run/pruned\.$"):
        load_pruned(tmp_path / "run")
    save_pruned(tmp_path, model, zoo.randomized(model, SHAPE))
    description = tmp_path / "model.json"
    (weights,) = tmp_path.glob("weights-*")
    content, text = bytearray(weights.read_bytes()), description.read_text()
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights-.*\.msgpack is damaged or missing"):
        load_pruned(tmp_path)
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for cls, message in [
        ("os:system", "os:system is not a flax module"),
        ("zoo:Gone", "zoo:Gone is not a class of this library or of an imported module"),
        ("antigravity:Gone", "antigravity:Gone is not a class of this library or of an imported module"),
        ("flax.linen:Dense", "flax.linen:Dense does not accept the saved attributes"),
    ]:
        changed = json.loads(text) | {"class": cls, "attributes": {"unknown": 1}}
        write_sealed(description, changed)
        with pytest.raises(ValueError, match=message):
            load_pruned(tmp_path)
        assert "antigravity" not in sys.modules
    description.write_text(text[:20])
    with pytest.raises(ValueError, match=r"model\.json is not JSON"):
        load_pruned(tmp_path)
    description.write_text(text.replace('"linen"', '"Linen"'))
    with pytest.raises(ValueError, match=r"model\.json is damaged: its checksum is wrong"):
        load_pruned(tmp_path)


def write_sealed(description, fields):
    """Writes malicious fields with a correct checksum."""
    files.write_sealed(description, {name: value for name, value in fields.items() if name != "checksum"})


HOSTILE_FIELDS = [
    ("class", 3, "class is not a str"),
    ("class", "ddnp_jax.models:create", "ddnp_jax.models:create is not a flax module"),
    ("class", "ddnp_jax", "ddnp_jax is not a class of this library"),
    ("class", "__main__:Gone", r"of an imported module; pass the unpruned network"),
    ("attributes", [1], "attributes is not a dict"),
    ("attributes", {"dtype": {"dtype": "evil"}}, "does not accept the saved attributes"),
    ("attributes", {"dtype": {"evil": 1}}, "does not accept the saved attributes"),
    ("missing", "abc", "missing is not a list"),
    ("missing", ["middle", 1], "lacks the attributes middle, 1"),
    ("sizes", [1], "model.json is damaged"),
    ("sizes", [[["first"], {"features": "x"}]], "a size is not a positive number"),
    ("sizes", [[["first"], {"features": {"dtype": 5}}]], "a size is not a positive number"),
    ("sizes", [[["first"], {"features": -3}]], "a size is not a positive number"),
    ("weights", "../../secret", "secret is damaged or missing: its checksum"),
    ("weights", None, "weights is not a str"),
    ("sha256", "0", "is damaged or missing: its checksum"),
    ("kind", "evil", "holds a evil network"),
    ("kind", "function", "holds a function network"),
    ("kind", None, "kind is not a str"),
]


@pytest.mark.parametrize(("field", "value", "message"), HOSTILE_FIELDS)
def test_hostile_descriptions_end_in_one_sentence(tmp_path, field, value, message):
    model = zoo.Sorted()
    save_pruned(tmp_path, model, zoo.randomized(model, SHAPE))
    description = tmp_path / "model.json"
    write_sealed(description, json.loads(description.read_text()) | {field: value})
    with pytest.raises(ValueError, match=message) as refusal:
        load_pruned(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "weights", [{}, 3, {"a": "b"}, {"a": np.zeros(2), "a\x1fb": np.zeros(2)}, {"params\x1fscale": np.array([np.nan])}]
)
def test_hostile_weights_end_in_one_sentence(tmp_path, weights):
    model = zoo.Sorted()
    save_pruned(tmp_path, model, zoo.randomized(model, SHAPE))
    description, content = tmp_path / "model.json", msgpack_serialize(weights)
    fields = json.loads(description.read_text())
    (tmp_path / fields["weights"]).write_bytes(content)
    write_sealed(description, fields | {"sha256": hashlib.sha256(content).hexdigest()})
    with pytest.raises(ValueError, match=r"holds no weights|has 1 values that are NaN or infinite"):
        load_pruned(tmp_path)


def test_a_network_that_is_not_finite_is_not_written(tmp_path):
    model = zoo.Sorted()
    variables = jax.tree.map(lambda leaf: leaf * np.inf, zoo.randomized(model, SHAPE))
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        save_pruned(tmp_path / "folder", model, variables)
    assert not (tmp_path / "folder").exists()
