"""Exported networks, read back by their own runtimes."""

import importlib.util
import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import ddnp_jax
from ddnp_jax import export, models
from ddnp_jax.topology import Selection, trace

SHAPE = (32, 32, 3)
SERVING = {"scale": 1 / 255, "mean": [0.5, 0.25, 0.125], "std": [0.25, 0.5, 1.0], "class_names": ["cat", "dog", "fox"]}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, *SHAPE)).astype(np.float32)
NORMALIZED = (PIXELS / 255 - np.array([0.5, 0.25, 0.125])) / np.array([0.25, 0.5, 1.0])


@pytest.fixture(scope="module")
def pruned():
    """A pruned ResNet-20 with unpruned residual streams."""
    model = models.create("resnet20", num_classes=3)
    variables = model.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32))
    topology = trace(model, SHAPE)
    widths = [width - 1 - i for i, width in enumerate(topology.widths)]
    return ddnp_jax.compact(model, variables, Selection.first(widths), topology)


def outputs(pruned, images):
    model, variables = pruned
    return np.asarray(model.apply(variables, np.float32(images)))


def test_stablehlo_takes_any_batch_of_pixels(pruned, tmp_path):
    found = export.stablehlo(tmp_path / "network", *pruned, PIXELS, serving=SERVING)
    assert found.max_difference < 1e-5 and found.argmax_agreement == 1
    read = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    assert read.platforms == ("cpu", "cuda", "tpu")
    wanted = outputs(pruned, NORMALIZED)
    for count in (1, 3):
        np.testing.assert_allclose(read.call(PIXELS[:count]), wanted[:count], atol=1e-5)
    assert json.loads((tmp_path / "network.json").read_text()) == {
        "input_shape": [32, 32, 3],
        "normalizes": True,
        **SERVING,
    }


def test_without_serving_the_images_are_taken_as_they_are(pruned, tmp_path):
    export.stablehlo(tmp_path / "network", *pruned, NORMALIZED, platforms=["cpu"])
    read = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    np.testing.assert_allclose(read.call(np.float32(NORMALIZED)), outputs(pruned, NORMALIZED), atol=1e-5)
    assert json.loads((tmp_path / "network.json").read_text())["normalizes"] is False


def test_onnx_takes_any_batch_of_pixels(pruned, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    found = export.onnx(tmp_path / "network.onnx", *pruned, PIXELS, serving=SERVING)
    assert found.max_difference < 1e-5 and found.argmax_agreement == 1
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    (pixels,) = session.get_inputs()
    wanted = outputs(pruned, NORMALIZED)
    for count in (1, 3):
        (logits,) = session.run(None, {pixels.name: PIXELS[:count]})
        np.testing.assert_allclose(logits, wanted[:count], atol=1e-5)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["ddnp_jax"])
    assert metadata["class_names"] == ["cat", "dog", "fox"]


def float_session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(None, {session.get_inputs()[0].name: np.float32(images)})[0]


@pytest.mark.parametrize("attributes", [{"shortcut": "projection"}, {"shortcut": "avgpool"}])
def test_onnx_of_branches_that_meet_and_of_average_pools(tmp_path, attributes):
    pytest.importorskip("jax2onnx")
    model = models.create("resnet20", num_classes=3, **attributes)
    variables = model.init(jax.random.key(1), np.zeros((1, *SHAPE), np.float32))
    export.onnx(tmp_path / "network.onnx", model, variables, NORMALIZED)
    found = float_session(tmp_path / "network.onnx")(NORMALIZED)
    np.testing.assert_allclose(found, outputs((model, variables), NORMALIZED), atol=1e-5)


def test_onnx_of_pools_with_positional_arguments_and_paddings_in_numbers(tmp_path):
    pytest.importorskip("jax2onnx")

    def pools(variables, x):
        padding = ((1, 2), (0, 1))
        return variables["one"] * nn.max_pool(x, (3, 2), (2, 2), padding) + nn.avg_pool(x, (3, 2), (2, 2), padding)

    images = -np.arange(1, 33, dtype=np.float32).reshape(1, 4, 4, 2)  # zeros around them would be the largest
    export.onnx(tmp_path / "network.onnx", pools, {"one": np.float32(1)}, images)
    padded = np.pad(images, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), (1, 2))[:, ::2, ::2]
    wanted = np.nanmax(windows, (-1, -2)) + np.nansum(windows, (-1, -2)) / 6
    np.testing.assert_allclose(float_session(tmp_path / "network.onnx")(images), wanted, rtol=1e-6)


def test_an_export_leaves_jax_as_it_is():
    pytest.importorskip("jax2onnx")
    code = (
        "import jax.numpy as jnp; from ddnp_jax import export; own = jnp.cumsum; "
        "export.in_onnx_runtime(lambda x: jnp.cumsum(x, axis=1), (2, 3)); assert jnp.cumsum is own; "
        "print(jnp.cumsum(jnp.arange(4), 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[0 1 3 6]\n", done.stderr[-2000:]


def test_onnx_computes_in_float32_what_the_network_does_in_bfloat16(pruned, tmp_path):
    pytest.importorskip("jax2onnx")
    model, variables = pruned
    export.onnx(tmp_path / "network.onnx", model.clone(dtype=jnp.bfloat16), variables, NORMALIZED)
    wanted = outputs(pruned, NORMALIZED)
    assert np.abs(outputs((model.clone(dtype=jnp.bfloat16), variables), NORMALIZED) - wanted).max() > 1e-3
    np.testing.assert_allclose(float_session(tmp_path / "network.onnx")(NORMALIZED), wanted, atol=1e-5)


def test_onnx_in_8_bits_has_integer_kernels_and_nearly_the_outputs(pruned, tmp_path):
    pytest.importorskip("jax2onnx")
    onnx = pytest.importorskip("onnx")
    calibration = RNG.integers(0, 256, (70, *SHAPE)).astype(np.float32)
    found = export.onnx_int8(tmp_path / "network.onnx", *pruned, PIXELS, calibration, serving=SERVING)
    wanted = outputs(pruned, NORMALIZED)
    difference = np.abs(float_session(tmp_path / "network.onnx")(PIXELS) - wanted).max()
    assert found.max_difference == pytest.approx(difference, abs=1e-5)
    assert 0 < difference < 0.05 * np.abs(wanted).max()
    proto = onnx.load(tmp_path / "network.onnx")
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    kernels = [array for array in weights.values() if array.shape[-2:] == (3, 3)]
    assert len(kernels) == 19 and {array.dtype for array in kernels} == {np.dtype(np.int8)}
    of_kernel = {node.input[0]: weights[node.input[1]] for node in proto.graph.node if node.input[0] in weights}
    lengths = [(len(weights[name]), scale.size) for name, scale in of_kernel.items() if weights[name].ndim == 4]
    assert len(lengths) >= 19 and all(channels == scales for channels, scales in lengths)  # one scale per channel
    assert not [node.name for node in proto.graph.node if node.op_type == "BatchNormalization"]
    metadata = {each.key: each.value for each in proto.metadata_props}
    assert json.loads(metadata["ddnp_jax"])["class_names"] == ["cat", "dog", "fox"]


def test_8_bits_need_images(pruned, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"^calibration contains no images; give a few hundred that are not from"):
        export.onnx_int8(tmp_path / "network.onnx", *pruned, PIXELS, PIXELS[:0])


def test_what_onnx_does_not_know_ends_in_a_sentence(tmp_path):
    pytest.importorskip("jax2onnx")

    def sorted_pixels(variables, x):
        return jax.pure_callback(np.sort, jax.ShapeDtypeStruct(x.shape, x.dtype), x * variables["one"])

    with pytest.raises(ValueError, match=r"^sorted_pixels cannot be written as ONNX \(.*\); export it to Sta"):
        export.onnx(tmp_path / "network.onnx", sorted_pixels, {"one": np.float32(1)}, NORMALIZED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "package", "extra"),
    [("onnx", "jax2onnx", "onnx"), ("onnx_int8", "onnxruntime", "onnx"), ("stablehlo", "flatbuffers", "stablehlo")],
)
def test_a_package_that_is_missing_is_named_before_any_work(form, package, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    sentence = f"export='{form}' needs {package}; run `pip install ddnp_jax[{extra}]`."
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(sentence)}$"):
        export.check_installed(form)


def test_nothing_is_written_of_a_network_that_computes_something_else(pruned, tmp_path, monkeypatch):
    read = jax.export.deserialize

    class Doubled:
        def __init__(self, artifact):
            self.call = lambda images: 1.001 * read(artifact).call(images)

    monkeypatch.setattr(jax.export, "deserialize", Doubled)
    with pytest.raises(
        ValueError, match=r"^the exported network does not compute what the network does: logits differ"
    ):
        export.stablehlo(tmp_path / "network", *pruned, NORMALIZED, platforms=["cpu"])
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(pruned, tmp_path):
    model, variables = pruned
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), variables)
    with pytest.raises(ValueError, match=r"has .* values that are NaN or infinite"):
        export.stablehlo(tmp_path / "network", model, broken, NORMALIZED)
    assert not list(tmp_path.iterdir())
