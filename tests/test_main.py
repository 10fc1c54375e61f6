"""`python -m ddnp_jax`: it prints the results of the library, and errors are one sentence."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

import ddnp_jax
from ddnp_jax import __main__ as command_line
from ddnp_jax import models, torch_weights
from ddnp_jax.__main__ import main
from ddnp_jax.cost import flops
from ddnp_jax.cost.budget import Budget, flops_cost

ROOT = Path(__file__).parents[1]
MODULE = """
import flax.linen as nn
import haiku as hk
import jax.numpy as jnp
from flax import nnx

class Small(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(self.features, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(12, (3, 3), name="second")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))

class OfNnx(nnx.Module):
    def __init__(self, rngs, width=6):
        self.first, self.head = nnx.Conv(3, width, (3, 3), rngs=rngs), nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.first(x)).mean((1, 2)))

small = Small()

def made(features=10):
    return Small(features)

def network(v, x):
    return x.mean((1, 2)) @ v["a"] @ v["b"]

def pair():
    return network, {"a": jnp.ones((3, 6)), "b": jnp.ones((6, 2))}

def bare():
    return network

def junk():
    return network, print

def transformed():
    return hk.transform(network)

def broken():
    raise RuntimeError("no\\nluck")

class Within:
    made = made
"""
DESCRIBED = """\
gates: 2
  0  first: 8 channels, read by second
  1  second: 12 channels, read by head
layers: 3
  first: kernel (3, 3, 3, 8), 64 positions, to gate 0
  second: kernel (3, 3, 8, 12), 64 positions, from gate 0, to gate 1
  head: kernel (12, 5), 1 positions, from gate 1
stays unpruned: 1
  head: it is the network's output
summary: 2 gates with 20 channels; 100.0 % of the 0.07 M multiply-accumulates are in layers that can be pruned.
  smallest reachable: 0.00 M multiply-accumulates (3.3 %), 0.000 M of 0.001 M parameters (4.1 %).
  69,180 of 69,180 are prunable FLOPs (macs); the smallest p that can be met is 0.0334.
"""
# 64 (27 f + 9 f s) + 5 s MACs at widths f and s, 28 f + (9 f + 1) s + 5 s + 5 parameters: f = 4 and s = 8
UNIFORM = """\

p = 0.4 can be met, for example by uniform widths:
multiply-accumulates: 69,180 -> 25,384 (63.3 % removed)
parameters: 1,165 -> 453 (61.1 % removed)
budget: 25,384 of at most 27,672 prunable FLOPs (macs) (p = 0.4)
  8% of the budget is unused: at these widths no gate can be a step wider within it.
  first: 4 of 8
  second: 8 of 12
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a module of networks, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    (tmp_path / "own_networks.py").write_text(MODULE)
    return tmp_path


@pytest.fixture
def printed(capsys):
    """Runs a command and returns what it prints."""

    def run(*arguments):
        main(arguments)
        return capsys.readouterr().out

    return run


def refused(*arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    return error.value.code


def test_the_documentation_has_what_is_printed():
    assert DESCRIBED + UNIFORM in (ROOT / "docs/guide/command_line.md").read_text()


@pytest.mark.parametrize("name", ["Small", "small"])
def test_describes_a_network_and_a_budget(printed, name):
    assert printed("describe", f"own_networks:{name}", "--input_shape=8,8,3", "--p=0.4") == DESCRIBED + UNIFORM


def test_a_process_of_its_own_does_the_same(folder):
    command = [sys.executable, "-m", "ddnp_jax", "describe", "own_networks:small", "--input_shape=8,8,3"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert (ended.returncode, ended.stdout) == (0, DESCRIBED), ended.stderr
    ended = subprocess.run([*command, "--p=0.03"], cwd=folder, capture_output=True, text=True, env=environment())
    assert (ended.returncode, ended.stdout) == (1, DESCRIBED)
    assert ended.stderr == (
        "error: p=0.03 cannot be met: it wants 2,075 prunable FLOPs (macs), but the smallest network (widths 1 or "
        "whole) has 2,309 and 48 parameters, the largest 69,180 and 1,165 parameters; use p of at least 0.0334.\n"
    )


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("own_networks:made", [10, 12]),
        ("own_networks:Within.made", [10, 12]),
        ("own_networks:OfNnx", [6]),
        ("own_networks:pair", [6]),
    ],
)
def test_networks_of_every_kind_are_made(printed, name, gates):
    text = printed("describe", name, "--input_shape=8,8,3")
    assert [int(width) for width in re.findall(r": (\d+) channels, read by", text)] == gates


def test_attributes_are_numbers_texts_and_tuples(printed):
    text = printed("describe", "own_networks:OfNnx", "--input_shape=8,8,3", "--attribute=width=9")
    assert "9 channels" in text
    arguments = ("--attribute=shortcut=projection", "--attribute=num_classes=7", "--attribute=widths=(3,) * 9")
    assert "error: own_networks:made(" in refused("describe", "own_networks:made", "--input_shape=8,8,3", *arguments)
    arguments = (*arguments[:2], "--attribute=widths=(2,3,4,5,6,7,8,9,10)")
    text = printed("describe", "resnet20", "--input_shape=32,32,3", *arguments)
    assert "gates: 9" in text and "(64, 7)" in text and ": 10 channels" in text


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2_cifar", "resnet18", "mobilenet_v3_small"])
def test_figures_are_those_of_the_library(printed, name):
    rng = np.random.default_rng(len(name))
    for convention in flops.CONVENTIONS:
        residual, p = bool(rng.integers(2)), round(float(rng.uniform(0.3, 1)), 3)
        flags = (*(["--residual"] if residual else []), f"--p={p}", f"--convention={convention}")
        text = printed("describe", name, "--input_shape=32,32,3", *flags)
        topology = ddnp_jax.trace(models.create(name, 1000), (32, 32, 3), residual=residual)
        assert text.startswith(topology.describe())
        least = float(re.search(r"the smallest p that can be met is (\S+)\.\n", text)[1])
        Budget(topology, least, flops_cost(convention)).check()
        with pytest.raises(ValueError, match=f"use p of at least {least:.4f}"):
            Budget(topology, least - 1e-4, flops_cost(convention)).check()
        prunable, total = (of(topology, None, convention) for of in (flops.prunable, flops.total))
        assert f"\n  {prunable:,} of {total:,} are prunable FLOPs ({convention}); " in text
        widths = [int(width) for width in re.findall(r"^  \S+: (\d+) of \d+$", text, re.MULTILINE)]
        assert p * prunable * 0.9 < flops.prunable(topology, widths, convention) <= p * prunable
        assert f" -> {flops.parameters(topology, widths):,} (" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("prune",), "argument COMMAND: invalid choice: 'prune' ("),
        (("describe", "resnet20"), "the following arguments are required: --input_shape"),
        (("describe", "resnet20", "--input=1,2"), "the following arguments are required: --input_shape"),
        (
            ("describe", "resnet21", "--input_shape=8,8,3"),
            "'resnet21' is not a model of this library (efficientnet_lite0",
        ),
        (
            ("describe", "resnet20", "--input_shape=8x8"),
            "argument --input_shape: '8x8' must be whole numbers from 1, jo",
        ),
        (("describe", "resnet20", "--input_shape=8,0,3"), "argument --input_shape: '8,0,3' must be whole numbers from"),
        (("describe", "resnet20", "--input_shape=8,8,-3"), "argument --input_shape: '8,8,-3' must be whole numbers fr"),
        (
            ("describe", "resnet20", "--input_shape=8"),
            "resnet20 with --input_shape=8: CifarResNet cannot be called with",
        ),
        (("describe", "resnet20", "--input_shape=8,8,3", "--p=half"), "argument --p: invalid float value: 'half'"),
        (
            ("describe", "own_networks:small", "--input_shape=8,8,3", "--p=2"),
            "p=2.0 must be in (0, 1]: the fraction of",
        ),
        (("describe", "own_networks:small", "--input_shape=8,8,3", "--p=nan"), "p=nan must be in (0, 1]: the fraction"),
        (
            ("describe", "resnet20", "--input_shape=8,8,3", "--convention=x"),
            "argument --convention: invalid choice: 'x'",
        ),
        (
            ("describe", "resnet20", "--input_shape=8,8,3", "--attribute=a"),
            "argument --attribute: 'a' must be NAME=VALUE",
        ),
        (
            ("describe", "resnet20", "--input_shape=8,8,3", "--attribute=a=1"),
            "model 'resnet20' does not take the attri",
        ),
        (
            ("describe", "nowhere:Net", "--input_shape=8,8,3"),
            "the module of nowhere:Net cannot be imported (ModuleNotFoundError: No module named 'nowhere'); give ",
        ),
        (
            ("describe", "own_networks:Big", "--input_shape=8,8,3"),
            "own_networks has no 'Big'; give MODULE:NAME with a f",
        ),
        (("describe", "own_networks:nnx", "--input_shape=8,8,3"), "own_networks:nnx is <module 'flax.nnx'"),
        (
            ("describe", "own_networks:bare", "--input_shape=8,8,3"),
            "own_networks:bare makes a function, whose variables",
        ),
        (("describe", "own_networks:junk", "--input_shape=8,8,3"), "own_networks:junk makes no network (TypeError: "),
        (
            ("describe", "own_networks:transformed", "--input_shape=8,8,3"),
            "own_networks:transformed makes no network (TypeError: Transformed(",
        ),
        (
            ("describe", "own_networks:broken", "--input_shape=8,8,3"),
            "own_networks:broken() raises RuntimeError: no; name",
        ),
        (
            ("describe", "own_networks:network", "--input_shape=8,8,3"),
            "own_networks:network() raises TypeError: network() missing 2 required positional arguments: 'v' and 'x'; ",
        ),
        (("compare",), "the following arguments are required: RUN"),
        (
            ("export", "nowhere", "--format=onnx", "--output=a"),
            "nowhere/model.json does not exist; load_pruned reads a f",
        ),
        (("export", "saved", "--output=a"), "the following arguments are required: --format"),
        (("export", "saved", "--format=tflite", "--output=a"), "argument --format: invalid choice: 'tflite' ("),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_end_in_a_sentence(arguments, sentence):
    pytest.importorskip("haiku")
    found = refused(*arguments)
    assert found.startswith(f"error: {sentence}") and "\n" not in found


def test_a_network_without_gates_is_described_and_has_no_budget(folder, capsys):
    (folder / "own_networks.py").write_text("import flax.linen as nn\ndense = nn.Dense(3)\n")
    arguments = ("describe", "own_networks:dense", "--input_shape=4")
    main(arguments)
    assert "gates: 0\n" in capsys.readouterr().out
    assert refused(*arguments, "--p=0.5").startswith("error: the network has no gate to prune; these stay unpruned: ")


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "trace", interrupt)
    assert refused("describe", "resnet20", "--input_shape=32,32,3") == 130
    assert capsys.readouterr().err == "interrupted.\n"


# ---- export

SHAPE = (32, 32, 3)
SERVING = {"input_shape": [*SHAPE], "scale": 1 / 255, "mean": [0.5, 0.25, 0.125], "std": [0.25, 0.5, 1.0]}
PIXELS = np.random.default_rng(0).integers(0, 256, (40, *SHAPE)).astype(np.uint8)


@pytest.fixture(scope="module")
def network():
    model = models.create("resnet20", num_classes=3)
    return model, model.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32))


@pytest.fixture
def saved(folder, network):
    """A run's folder, and pixels beside it."""
    ddnp_jax.save_pruned(folder / "run/pruned", *network)
    (folder / "run/pruned/serving.json").write_text(json.dumps(SERVING))
    np.save("pixels.npy", PIXELS)
    return folder / "run"


def logits(network, pixels):
    model, variables = network
    return np.asarray(model.apply(variables, (pixels / np.float32(255) - SERVING["mean"]) / SERVING["std"]))


@pytest.mark.parametrize("images", [(), ("--images=pixels.npy",)])
@pytest.mark.parametrize("folder_of", ["run", "run/pruned"])
def test_a_run_is_exported_to_stablehlo_with_its_normalization(saved, network, printed, images, folder_of):
    pytest.importorskip("flatbuffers")
    text = printed("export", folder_of, "--format=stablehlo", "--output=new/network", *images)
    size = Path("new/network").stat().st_size
    kind = "images" if images else "random images"
    wanted = rf"new/network: {size:,} bytes; takes pixels \(N, 32, 32, 3\)\. Over 32 {kind} the largest difference to "
    assert re.fullmatch(
        wanted + r"the network is \d\.\de[-+]\d\d, and 100\.0 % of the predictions are the same\.\n", text
    )
    read = jax.export.deserialize(bytearray(Path("new/network").read_bytes()))
    np.testing.assert_allclose(read.call(np.float32(PIXELS[:5])), logits(network, PIXELS[:5]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "tolerance"), [("onnx", 1e-4), ("onnx_int8", 0.2)])
def test_a_run_is_exported_to_onnx(saved, network, printed, form, tolerance):
    pytest.importorskip("jax2onnx")
    text = printed("export", "run", f"--format={form}", "--output=network.onnx", "--images=pixels.npy")
    assert text.startswith("network.onnx: ")
    (found,), wanted = ddnp_jax.export.read_onnx("network.onnx")(PIXELS), logits(network, PIXELS)
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


def test_a_run_is_exported_to_pytorch(saved, network, printed):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    assert printed("export", "run", "--format=pytorch", "--output=new/torch") == (
        "new/torch: weights.safetensors, pytorch_layers.py\n"
    )
    wanted = torch_weights.export(*network)
    found = load_file("new/torch/weights.safetensors")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_network_of_ones_own_is_exported_with_its_module(folder, printed, monkeypatch):
    pytest.importorskip("flatbuffers")
    monkeypatch.syspath_prepend(folder)
    own = importlib.import_module("own_networks")
    model = own.OfNnx(rngs=own.nnx.Rngs(3), width=4)
    ddnp_jax.save_pruned("own", model)
    arguments = ("export", "own", "--format=stablehlo", "--output=network")
    shape, network = "--input_shape=8,8,3", "--network=own_networks:OfNnx"
    assert refused(*arguments, shape) == (
        "error: own/model.json holds a nnx network, of which only the variables can be saved; pass the unpruned "
        "network, --network=MODULE:NAME."
    )
    assert refused(*arguments, network) == (
        "error: own has no serving.json; give --input_shape, as in 224,224,3, or --images=FILE.npy."
    )
    assert "takes images as the network does, (N, 8, 8, 3)." in printed(*arguments, shape, network)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    read = jax.export.deserialize(bytearray(Path("network").read_bytes()))
    np.testing.assert_allclose(read.call(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--format=onnx_int8",),
            "--format=onnx_int8 needs --images=FILE.npy, a few hundred images that are not from ",
        ),
        (("--images=grey.npy",), "CifarResNet cannot be called with images (4, 32, 32, 1): "),
        (
            ("--images=none.npy",),
            "--images=none.npy cannot be read ([Errno 2] No such file or directory: 'none.npy'); ",
        ),
        (("--images=own_networks.py",), "--images=own_networks.py cannot be read ("),
        (
            ("--images=empty.npy",),
            "--images=empty.npy contains no images; give one numeric array (N, H, W, C) in a .npy",
        ),
        (
            ("--images=texts.npy",),
            "--images=texts.npy contains no images; give one numeric array (N, H, W, C) in a .npy",
        ),
        (
            ("--images=many.npz",),
            "--images=many.npz contains no images; give one numeric array (N, H, W, C) in a .npy ",
        ),
        (("--output=run",), "--output=run is not a file, which --format=stablehlo writes; give another path."),
        (
            ("--format=pytorch", "--output=grey.npy"),
            "--output=grey.npy is not a folder, which --format=pytorch writes; giv",
        ),
        (("--network=own_networks:small",), "run/pruned/model.json holds a network with "),
    ],
)
def test_what_cannot_be_exported_ends_in_a_sentence(saved, arguments, sentence):
    np.save("grey.npy", PIXELS[:4, ..., :1])
    np.save("empty.npy", PIXELS[:0])
    np.save("texts.npy", np.array([["a"]]))
    np.savez("many.npz", a=PIXELS[:1])
    found = refused("export", "run", "--format=stablehlo", "--output=network", *arguments)
    assert found.startswith(f"error: {sentence}") and "\n" not in found
    assert not Path("network").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"mean": [0]}'])
def test_damaged_preprocessing_is_named(saved, content):
    (saved / "pruned/serving.json").write_text(content)
    found = refused("export", "run", "--format=stablehlo", "--output=network")
    assert found.startswith("error: run/pruned/serving.json ") and "restore a good copy" in found


def test_a_missing_package_is_named(saved, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax2onnx" else find_spec(name))
    assert refused("export", "run", "--format=onnx", "--output=network.onnx") == (
        "error: export='onnx' needs jax2onnx; run `pip install ddnp_jax[onnx]`."
    )


def test_the_page_of_fields_is_in_the_documentation(printed):
    page = (Path(__file__).parents[1] / "docs" / "fields.md").read_text()
    assert printed("fields") == page, "run `python -m ddnp_jax fields > docs/fields.md`"
    assert (
        "| `tie_weight` | `1.0` | ρ, the weight of the tie; 0 disentangles importance and width completely. |" in page
    )
    optimizer = "AdamW of the gates; its learning rate is multiplied by 0.1 at `decay_at`. Weight decay."
    assert f"| `optimizer.weight_decay` | `0.01` | {optimizer} |" in page
    inherited = page[page.index("## `finetune`") : page.index("## `parallel`")]
    assert "| `momentum` | `0.9` | Momentum of SGD. |" in inherited and "| `control` | `False` | " in inherited
    assert [line for line in page.splitlines() if line.endswith("| |") and line != "| field | default | |"] == []
