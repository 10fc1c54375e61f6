"""Exported networks, read back by their own runtimes."""

import json

import jax
import jax.export
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
    """A ResNet-20 of which a part is cut, residual streams left whole."""
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
