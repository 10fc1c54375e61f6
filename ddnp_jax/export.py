"""Networks for other runtimes: StableHLO and ONNX, each read back and compared before it is written.

    export.onnx("network.onnx", pruned.model, pruned.variables, images)
    export.stablehlo("network.stablehlo", pruned.model, pruned.variables, images)

Both take any number of images per call. With `serving`, what `Dataset.serving` returns and a run keeps as
`pruned/serving.json`, the exported network takes pixels and normalizes them itself, and its metadata say what it sees
and what its outputs stand for. For PyTorch: `ddnp_jax.torch_weights.save`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ddnp_jax import files
from ddnp_jax.compact import Verification, check_finite, compare_outputs
from ddnp_jax.extras import needed_by
from ddnp_jax.networks import Network, as_network

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4  # of the largest output, as in `verify`
_METADATA = "ddnp_jax"  # key of an ONNX file's metadata

Serving = Mapping[str, Any]


def stablehlo(
    path: str | Path,
    model: Any,
    variables: Any,
    images: Any,
    *,
    serving: Serving | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Verification:
    """Writes a network as a StableHLO artifact, which `jax.export.deserialize` reads without this library and flax.

    JAX promises to read artifacts for a limited time; a folder of `save_pruned` is the archive. The metadata are
    written beside it, as `PATH.json`.

    Args:
      path: Path of the file.
      model: The network, of any kind that `trace` takes; evaluation mode is exported.
      variables: Variables of the network; None of an nnx module, which holds them.
      images: Images (N, H, W, C) to compare with: as the network takes them, or pixels where there is `serving`.
      serving: What must be done to an image first; None of nothing.
      platforms: Platforms that it runs on.

    Returns:
      How near the outputs of the file are to those of the network.

    Raises:
      ModuleNotFoundError: flatbuffers is missing.
      ValueError: A variable is not finite, or the outputs differ by more than 1e-4 of the largest.
    """
    with needed_by("export to StableHLO", "stablehlo"):
        import flatbuffers  # noqa: F401  # which jax.export writes with
    served = _Served(model, variables, images, serving)
    batch, *_ = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, *served.images.shape[1:]), jnp.float32)
    artifact = jax.export.export(jax.jit(served.apply), platforms=list(platforms))(image).serialize()
    read = jax.export.deserialize(bytearray(artifact))
    found = served.compared(read.call)
    files.write_json(f"{path}.json", served.metadata())
    files.write_bytes(path, bytes(artifact))
    return found


def onnx(path: str | Path, model: Any, variables: Any, images: Any, *, serving: Serving | None = None) -> Verification:
    """Writes a network as an ONNX file, and compares it in ONNX Runtime on the CPU.

    Inputs stay (N, H, W, C). The metadata are a property of the file, in JSON.

    Args:
      path: Path of the file; the other arguments as of `stablehlo`.
      model: See there.
      variables: See there.
      images: See there.
      serving: See there.

    Returns:
      How near the outputs of the file are to those of the network.

    Raises:
      ModuleNotFoundError: jax2onnx, onnx or onnxruntime is missing.
      ValueError: A variable is not finite, or the outputs differ by more than 1e-4 of the largest.
    """
    with needed_by("export to ONNX", "onnx"):
        import jax2onnx
        import onnxruntime
    served = _Served(model, variables, images, serving)
    proto = jax2onnx.to_onnx(served.apply, [("batch", *served.images.shape[1:])], model_name="ddnp_jax")
    proto.metadata_props.add(key=_METADATA, value=json.dumps(served.metadata()))
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of every padding whose size depends on that of the image
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = served.compared(lambda pixels: session.run(None, {name: np.asarray(pixels)}))
    files.write_bytes(path, content)
    return found


class _Served:
    """A network, what is done to its images first, and images to compare with."""

    def __init__(self, model: Any, variables: Any, images: Any, serving: Serving | None) -> None:
        self.network: Network = as_network(model)
        self.variables = self.network.variables(variables)
        self.images = np.asarray(images, np.float32)
        self.serving = serving
        check_finite(self.variables, self.network.name)

    def apply(self, images: jax.Array) -> Any:
        """The outputs of images, or of pixels where they are normalized here."""
        if self.serving is not None:
            mean, std = (jnp.asarray(self.serving[name], jnp.float32).reshape(1, 1, 1, -1) for name in ("mean", "std"))
            images = (self.serving["scale"] * images - mean) / std
        return self.network.evaluate(self.variables, images)

    def metadata(self) -> dict[str, Any]:
        """What the file needs to be used."""
        return {"input_shape": list(self.images.shape[1:]), "normalizes": self.serving is not None} | dict(
            self.serving or {}
        )

    def compared(self, read: Callable[[Any], Any]) -> Verification:
        """The outputs of what was read back against the network's."""
        whole = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(self.apply)(self.images))]
        found = [np.asarray(leaf) for leaf in jax.tree.leaves(read(self.images))]
        return compare_outputs([*zip(whole, found, strict=True)], TOLERANCE, "the exported network", "the network")
